// Reads one process: /proc/PID/stat and its CPU clock.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <sys/resource.h>
#include <sys/types.h>

#include "system/clock.h"
#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

// What /proc/PID/stat says of a process. Times are totals since it began.
struct ProcessStat {
    pid_t parent;
    bool living;             // not a zombie
    double own_s, waited_s;  // its own CPU time, and that of children that it waited for
    std::uint64_t start_ticks;
    std::uint64_t rss_bytes;
};

// The clock of a process, as clock_getcpuclockid returns it, but without a system call:
// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of include/linux/posix-timers.h. The id of a thread
// that is not a process has none.
inline clockid_t cpu_clock_of(pid_t pid) noexcept {
    return static_cast<clockid_t>(~static_cast<unsigned>(pid) << 3 | 2u);
}

// Skips a field that parse_number refuses: a negative number. We use none of those.
inline bool skip_word(const char*& at, const char* end) noexcept {
    while (at < end && *at != ' ') ++at;
    return at < end;
}

// As long as this file is open it refers to this process. After it has exited, reads fail, even if
// another process has its pid then.
inline File open_stat(pid_t pid) noexcept {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
    return File(path);
}

// Fills in `stat`. False if there is no such process any more.
inline bool read_stat(const File& file, pid_t pid, ProcessStat& stat, double tick_s,
                      std::uint64_t page_bytes) noexcept {
    char text[1024];
    const std::size_t length = file.read(text, sizeof text);
    // Field 2, the command, may contain spaces and parentheses. The last ) ends it.
    const char* at = static_cast<const char*>(memrchr(text, ')', length));
    if (at == nullptr || length < static_cast<std::size_t>(at - text) + 4) return false;
    const char state = at[2];
    at += 4;  // ") S "
    const char* const end = text + length;
    std::array<std::uint64_t, 25> fields{};  // proc(5) counts from 1
    for (std::size_t field = 4; field < fields.size(); ++field)
        if (!parse_number(at, end, fields[field]) && !skip_word(at, end)) return false;
    stat.parent = static_cast<pid_t>(fields[4]);
    // No threads: its parent has just waited for it, and the kernel gives no parent any more
    // (do_task_stat without a sighand). If we took it for an orphan, its time would count twice.
    if (fields[20] == 0) return false;
    // The main thread may have ended before the others.
    stat.living = (state != 'Z' && state != 'X') || fields[20] > 1;
    stat.start_ticks = fields[22];
    stat.rss_bytes = fields[24] * page_bytes;
    stat.waited_s = static_cast<double>(fields[16] + fields[17]) * tick_s;
    // Its clock counts ns. Use the ticks of /proc only where the kernel refuses it.
    const std::int64_t own_ns = read_clock_ns(cpu_clock_of(pid));
    stat.own_s = own_ns >= 0 ? 1e-9 * static_cast<double>(own_ns)
                             : static_cast<double>(fields[14] + fields[15]) * tick_s;
    return true;
}

// Our own waited_s, but not rounded down to ticks.
inline double own_waited_s() noexcept {
    rusage waited{};
    ::getrusage(RUSAGE_CHILDREN, &waited);
    const timeval &user = waited.ru_utime, &system = waited.ru_stime;
    return static_cast<double>(user.tv_sec + system.tv_sec) +
           1e-6 * static_cast<double>(user.tv_usec + system.tv_usec);
}

// Updates what can change in our own ProcessStat; cheaper than read_stat. `memory` is our
// /proc/PID/statm; without it the memory stays as it is.
inline void read_own(ProcessStat& stat, const File& memory, std::uint64_t page_bytes) noexcept {
    const std::int64_t own_ns = read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    stat.own_s = std::max(stat.own_s, 1e-9 * static_cast<double>(own_ns));
    stat.waited_s = own_waited_s();
    if (!memory) return;
    char text[128];  // size resident ..., in pages
    const std::size_t length = memory.read(text, sizeof text);
    const char* at = text;
    std::uint64_t pages = 0;
    if (parse_number(at, text + length, pages) && parse_number(at, text + length, pages))
        stat.rss_bytes = pages * page_bytes;
}

}  // namespace pepr
