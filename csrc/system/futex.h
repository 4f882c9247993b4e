// Sleeping until a number in memory changes, with an absolute deadline.
#pragma once

#include <atomic>
#include <climits>
#include <cstdint>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "system/clock.h"

namespace pepr {

// Sleeps until `word` differs from `expected` or CLOCK_MONOTONIC reaches `deadline_ns`. Returns
// whether it differs. Only a futex has both an absolute deadline and a predicate; it costs as much
// as clock_nanosleep.
inline bool wait_while(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                       std::int64_t deadline_ns) noexcept {
    static_assert(sizeof(word) == sizeof(std::uint32_t));
    const timespec deadline = to_timespec(deadline_ns);
    while (word.load(std::memory_order_acquire) == expected && now_ns() < deadline_ns)
        ::syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, expected, &deadline,
                  nullptr, FUTEX_BITSET_MATCH_ANY);
    return word.load(std::memory_order_acquire) != expected;
}

inline void wake_all(std::atomic<std::uint32_t>& word) noexcept {
    ::syscall(SYS_futex, &word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX);
}

}  // namespace pepr
