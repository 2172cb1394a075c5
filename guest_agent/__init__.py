"""The agent inside the microVM: its PID 1, answering `grpc.AgentService` for the host.

Start-up under emulation is what a user waits for, so modules here import little, and `__main__` decides
the order: the socket listens before anything heavy is imported.
"""
