/*
 * The floor's PID 1: the least that a guest can do and still answer the host over vsock.
 *
 * Loads the modules that the agent loads before it listens, in the agent's order, then listens, accepts one
 * connection, tells when it started and when it answered, and sleeps until the machine is killed. No libc, nothing
 * mounted, no file read but the modules: what is left of the time is QEMU's and the kernel's.
 *
 * /floor.modules holds the modules' paths, each ended by a zero byte.
 */

#ifndef __x86_64__
#error "only the x86_64 system calls are here"
#endif

enum {
    SYS_read = 0,
    SYS_write = 1,
    SYS_open = 2,
    SYS_close = 3,
    SYS_pause = 34,
    SYS_socket = 41,
    SYS_accept = 43,
    SYS_bind = 49,
    SYS_listen = 50,
    SYS_exit = 60,
    SYS_clock_gettime = 228,
    SYS_finit_module = 313,
};

enum { AF_VSOCK = 40, SOCK_STREAM = 1, O_RDONLY = 0, CLOCK_BOOTTIME = 7 };

struct timespec {
    long seconds;
    long nanoseconds;
};

/* struct sockaddr_vm of <linux/vm_sockets.h> */
struct address {
    unsigned short family;
    unsigned short reserved;
    unsigned int port;
    unsigned int cid;
    unsigned char zero[4];
};

static long call(long number, long a, long b, long c)
{
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
    return result;
}

/* The end of PID 1 is a kernel panic, whose message on the console carries the status. */
static long must(long result, int status)
{
    if (result < 0)
        call(SYS_exit, status, 0, 0);
    return result;
}

static void load(const char *path)
{
    long fd = must(call(SYS_open, (long)path, O_RDONLY, 0), 10);

    must(call(SYS_finit_module, fd, (long)"", 0), 11);
    call(SYS_close, fd, 0, 0);
}

static long listener(void)
{
    static const struct address any = { .family = AF_VSOCK, .port = FLOOR_PORT, .cid = 0xffffffffu };
    long fd = must(call(SYS_socket, AF_VSOCK, SOCK_STREAM, 0), 20);

    must(call(SYS_bind, fd, (long)&any, sizeof any), 21);
    must(call(SYS_listen, fd, 1, 0), 22);
    return fd;
}

static char paths[4096];
static struct timespec started_answered[2];

void _start(void)
{
    long fd, size, last = 0, start = 0, at;

    must(call(SYS_clock_gettime, CLOCK_BOOTTIME, (long)&started_answered[0], 0), 3);
    fd = must(call(SYS_open, (long)"/floor.modules", O_RDONLY, 0), 1);
    size = must(call(SYS_read, fd, (long)paths, sizeof paths), 2);
    for (at = 0; at + 1 < size; at++)
        if (paths[at] == 0)
            last = at + 1;
    for (at = 0; at < last; at++)
        if (paths[at] == 0) {
            load(paths + start);
            start = at + 1;
        }
    /*
     * The last module is the transport, with which the host's connection can arrive. The socket listens by then: who
     * connects is never refused, and need not try twice.
     */
    fd = listener();
    load(paths + last);

    fd = must(call(SYS_accept, fd, 0, 0), 30);
    must(call(SYS_clock_gettime, CLOCK_BOOTTIME, (long)&started_answered[1], 0), 3);
    must(call(SYS_write, fd, (long)started_answered, sizeof started_answered), 31);
    for (;;)
        call(SYS_pause, 0, 0, 0);
}
