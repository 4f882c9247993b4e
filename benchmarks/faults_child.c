// A command whose life is known: usage: faults_child MARKS SECONDS STATUS
//
// It writes its PID, its first and its last instant (CLOCK_MONOTONIC, ns) into MARKS, which exists.
// A shared mapping needs no descriptor later, and no limit on the size of files forbids it. Where
// MARKS cannot be opened, it does the rest all the same.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int main(int argc, char** argv) {
    if (argc != 4) return 99;
    static int64_t nowhere[3];
    volatile int64_t* marks = nowhere;
    const int fd = open(argv[1], O_RDWR);
    if (fd >= 0) {
        void* const page = mmap(NULL, sizeof nowhere, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) marks = page;
        close(fd);
    }
    marks[1] = now_ns();
    marks[0] = getpid();
    const int64_t end_ns = marks[1] + (int64_t)(atof(argv[2]) * 1e9);
    while (now_ns() < end_ns) {
        const struct timespec until = {end_ns / 1000000000, end_ns % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    marks[2] = now_ns();
    return atoi(argv[3]);
}
