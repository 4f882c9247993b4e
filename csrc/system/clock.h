// Reads the kernel's clocks, in ns.
#pragma once

#include <cstdint>
#include <ctime>

namespace pepr {

constexpr std::int64_t kNsPerS = 1'000'000'000;

// -1 where there is no such clock, as for a process that has ended.
inline std::int64_t read_clock_ns(clockid_t clock) noexcept {
    timespec ts{};
    if (::clock_gettime(clock, &ts) != 0) return -1;
    return static_cast<std::int64_t>(ts.tv_sec) * kNsPerS + ts.tv_nsec;
}

// The clock of all samples. Marks share it: Python's time.monotonic_ns() reads the same one.
inline std::int64_t now_ns() noexcept { return read_clock_ns(CLOCK_MONOTONIC); }

inline timespec to_timespec(std::int64_t t_ns) noexcept {
    return {static_cast<time_t>(t_ns / kNsPerS), static_cast<long>(t_ns % kNsPerS)};
}

}  // namespace pepr
