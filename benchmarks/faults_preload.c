// A bad disk or a bad clock for whoever loads this (LD_PRELOAD). FAULT is: KIND VALUE FROM_S UNTIL_S,
// seconds since the program's start.
//
//   slow S       each write to a file takes S seconds longer
//   error ERRNO  writes to files fail
//   short _      writes to files write half of what they should
//   step S       the wall clock is S seconds ahead
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char kind[16];
static double value, from_s, until_s, began_s;

static int real_clock(clockid_t clock, struct timespec* time) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
    return real(clock, time);
}

static double now_s(void) {
    struct timespec now;
    real_clock(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

__attribute__((constructor)) static void begin(void) {
    began_s = now_s();
    const char* const fault = getenv("FAULT");
    if (fault) sscanf(fault, "%15s %lf %lf %lf", kind, &value, &from_s, &until_s);
}

static int holds(const char* wanted) {
    const double since_s = now_s() - began_s;
    return strcmp(kind, wanted) == 0 && from_s <= since_s && since_s < until_s;
}

static int is_file(int fd) {
    struct stat about;
    return fstat(fd, &about) == 0 && S_ISREG(about.st_mode);
}

// How many of `count` bytes to write now; -1 with errno if none.
static ssize_t allowed(int fd, size_t count) {
    if (!is_file(fd)) return (ssize_t)count;
    if (holds("error")) {
        errno = (int)value;
        return -1;
    }
    if (holds("slow")) usleep((useconds_t)(1e6 * value));
    return (ssize_t)(holds("short") && count > 1 ? count / 2 : count);
}

ssize_t write(int fd, const void* data, size_t count) {
    static ssize_t (*real)(int, const void*, size_t);
    if (!real) real = (ssize_t(*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
    const ssize_t size = allowed(fd, count);
    return size < 0 ? -1 : real(fd, data, (size_t)size);
}

ssize_t pwrite(int fd, const void* data, size_t count, off_t offset) {
    static ssize_t (*real)(int, const void*, size_t, off_t);
    if (!real) real = (ssize_t(*)(int, const void*, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    const ssize_t size = allowed(fd, count);
    return size < 0 ? -1 : real(fd, data, (size_t)size, offset);
}

ssize_t pwrite64(int fd, const void* data, size_t count, off64_t offset) {
    return pwrite(fd, data, count, (off_t)offset);
}

int clock_gettime(clockid_t clock, struct timespec* time) {
    const int status = real_clock(clock, time);
    if (status == 0 && clock == CLOCK_REALTIME && holds("step")) time->tv_sec += (time_t)value;
    return status;
}

int gettimeofday(struct timeval* restrict time, void* restrict zone) {
    (void)zone;
    struct timespec now;
    const int status = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return status;
}

time_t time(time_t* where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
