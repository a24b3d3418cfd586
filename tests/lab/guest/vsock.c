/* The guest's end of its vsock connections with the host.
 *   vsock echo PORT   takes connections, and says again what comes
 *   vsock call PORT   connects to the host, says a numbered line, waits for its echo, and so on; when the
 *                     connection ends it says why, and connects anew
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static struct sockaddr_vm at(unsigned cid, unsigned port) {
    return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
}

static int give_all(int fd, const char *bytes, ssize_t left) {
    for (ssize_t n; left > 0; bytes += n, left -= n)
        if ((n = write(fd, bytes, left)) <= 0) return -1;
    return 0;
}

static int echo(unsigned port) {
    struct sockaddr_vm address = at(VMADDR_CID_ANY, port);
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8))
        return perror("GUEST-BAD vsock: listen"), 1;
    for (;;) {
        int fd = accept(listener, 0, 0);
        if (fd < 0) return perror("GUEST-BAD vsock: accept"), 1;
        if (fork() == 0) {
            char bytes[16384];
            ssize_t n;
            while ((n = read(fd, bytes, sizeof bytes)) > 0 && give_all(fd, bytes, n) == 0) {}
            printf("GUEST-VSOCK taken: %s\n", n == 0 ? "ended" : strerror(errno));
            exit(0);
        }
        close(fd);
    }
}

/* Lines said and heard again, until the connection ends; `errno` is why, 0 for its end. */
static long speak(int fd) {
    char said[32], heard[32];
    for (long lines = 0;; lines++) {
        int size = snprintf(said, sizeof said, "guest line %ld\n", lines), got = 0;
        if (give_all(fd, said, size)) return lines;
        while (got < size) {
            ssize_t n = read(fd, heard + got, size - got);
            if (n == 0) errno = 0;
            if (n <= 0) return lines;
            got += n;
        }
        if (memcmp(said, heard, size)) printf("GUEST-BAD vsock: line %ld comes back wrong\n", lines);
        usleep(300000);
    }
}

static void call(unsigned port) {
    struct sockaddr_vm host = at(VMADDR_CID_HOST, port);
    for (;; sleep(1)) {
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (connect(fd, (void *)&host, sizeof host) == 0) {
            printf("GUEST-VSOCK call begins\n");
            long lines = speak(fd);
            printf("GUEST-VSOCK call ends after %ld lines: %s\n", lines, errno ? strerror(errno) : "ended");
        }
        close(fd);
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    if (argc != 3) return 2;
    if (strcmp(argv[1], "echo") == 0) return echo(atoi(argv[2]));
    call(atoi(argv[2]));
}
