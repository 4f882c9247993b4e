/* follow_tree COUNT: that many processes, each of which runs for a moment every second, until
   stdin is closed. Prints a line when all are there. */

#define _GNU_SOURCE
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    const int count = argc > 1 ? atoi(argv[1]) : 1;
    int end[2];
    if (pipe(end) != 0) return 1;
    for (int i = 1; i < count; ++i) {
        const pid_t pid = fork();
        if (pid < 0) {
            perror("fork");
            return 1;
        }
        if (pid == 0) {
            struct pollfd closed = {.fd = end[0], .events = POLLIN};
            close(end[1]);
            while (poll(&closed, 1, 1000) == 0) {
            }
            _exit(0);
        }
    }
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF) {
    }
    close(end[1]);
    while (wait(NULL) > 0) {
    }
    return 0;
}
