"""rtnetlink: a machine's interfaces, addresses, routes, rules and neighbours, asked of and told to the kernel.

`wire` is bytes only; `objects` and `routes` are what the kernel tells, as plain tuples; `rtnl` is the socket with one
method for each question and order; `rules` are those that choose among routing tables; `tc` are the traffic control
orders that join two interfaces.

The shim uses it for the pod's network namespace, and the agent inside the guest for the guest's own network. The guest
is why it exists: the libraries that there are cost more memory and time there than the whole agent.
"""
