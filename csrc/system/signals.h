// Waits for a signal, a readable descriptor and a deadline at once.
#pragma once

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <optional>

#include <poll.h>
#include <sys/signalfd.h>

#include "system/clock.h"
#include "system/file.h"

namespace pepr {

// Waits for a signal of the set, all of which this thread must block, and returns it. Returns
// nothing when CLOCK_MONOTONIC reaches the deadline, when `fd` (-1: none) can be read, or, with
// EINTR in `error`, after a handler for another signal ran.
inline std::optional<siginfo_t> wait_signal(const sigset_t& set, std::int64_t deadline_ns, int fd,
                                            int& error) noexcept {
    // Without a free descriptor for the signalfd it waits for signals alone. It then returns soon,
    // so that the caller can look at `fd` itself.
    constexpr std::int64_t kWithoutFdNs = kNsPerS / 2;
    const File signals(fd < 0 ? -1 : ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    if (fd >= 0 && !signals) deadline_ns = std::min(deadline_ns, now_ns() + kWithoutFdNs);
    error = 0;
    for (;;) {
        const timespec left = to_timespec(std::max<std::int64_t>(0, deadline_ns - now_ns()));
        siginfo_t info{};
        const timespec none{};  // with a signalfd, ppoll does the waiting
        if (::sigtimedwait(&set, &info, signals ? &none : &left) >= 0) return info;
        if (errno != EAGAIN) error = errno;
        if (error != 0 || !signals || now_ns() >= deadline_ns) return std::nullopt;
        pollfd ready[] = {{signals.fd(), POLLIN, 0}, {fd, POLLIN, 0}};
        if (::ppoll(ready, 2, &left, nullptr) < 0) error = errno;
        if (error != 0 || ready[1].revents != 0) return std::nullopt;
    }
}

}  // namespace pepr
