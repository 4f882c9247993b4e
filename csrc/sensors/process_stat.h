#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <sys/types.h>

#include "../clock.h"
#include "../file.h"

namespace pepr {

// The numbers of /proc/PID/stat that we use. Times are totals since the process began.
struct Stat {
    pid_t parent;
    bool living;  // no zombie
    double own_s, waited_s;
    std::uint64_t start_ticks;
    std::uint64_t rss_bytes;
};

// The clock of a process, as clock_getcpuclockid makes it but without its system call:
// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of include/linux/posix-timers.h. There is none for the
// pid of a thread.
inline clockid_t cpu_clock_of(pid_t pid) noexcept {
    return static_cast<clockid_t>(~static_cast<unsigned>(pid) << 3 | 2u);
}

// A number below 0, which none of ours is.
inline bool skip_word(const char*& at, const char* end) noexcept {
    while (at < end && *at != ' ') ++at;
    return at < end;
}

// Kept open, it names one process for ever: once that has exited, it tells nothing, whoever has its
// pid then.
inline File open_stat(pid_t pid) noexcept {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
    return File(path);
}

// False if there is no such process.
inline bool read_stat(const File& file, pid_t pid, Stat& stat, double tick_s,
                      std::uint64_t page_bytes) noexcept {
    char text[1024];
    const std::size_t length = file.read(text, sizeof text);
    // Field 2, the command, may hold spaces and parentheses: the last ) ends it.
    const char* at = static_cast<const char*>(memrchr(text, ')', length));
    if (at == nullptr || length < static_cast<std::size_t>(at - text) + 4) return false;
    const char state = at[2];
    at += 4;  // ") S "
    const char* const end = text + length;
    std::array<std::uint64_t, 25> fields{};  // proc(5) counts from 1
    for (std::size_t field = 4; field < fields.size(); ++field)
        if (!parse_number(at, end, fields[field]) && !skip_word(at, end)) return false;
    stat.parent = static_cast<pid_t>(fields[4]);
    // Its parent has just waited for it, and the kernel knows neither threads nor parent any more
    // (do_task_stat without a sighand). Taken for an orphan, its time would count twice.
    if (fields[20] == 0) return false;
    // The main thread may have ended before the others.
    stat.living = (state != 'Z' && state != 'X') || fields[20] > 1;
    stat.start_ticks = fields[22];
    stat.rss_bytes = fields[24] * page_bytes;
    stat.waited_s = static_cast<double>(fields[16] + fields[17]) * tick_s;
    // Its own clock counts ns; the ticks are for kernels that refuse it.
    const std::int64_t own_ns = read_clock_ns(cpu_clock_of(pid));
    stat.own_s = own_ns >= 0 ? 1e-9 * static_cast<double>(own_ns)
                             : static_cast<double>(fields[14] + fields[15]) * tick_s;
    return true;
}

}  // namespace pepr
