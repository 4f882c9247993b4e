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

// A pending signal of the set, all of which this thread blocks. Nothing when CLOCK_MONOTONIC is at
// the deadline, when `fd` (-1: none) can be read, or, with EINTR in `error`, when another signal
// was handled.
inline std::optional<siginfo_t> wait_signal(const sigset_t& set, std::int64_t deadline_ns, int fd,
                                            int& error) noexcept {
    // A process that has no descriptor left hears its signals all the same, and returns soon to
    // have a look for itself.
    constexpr std::int64_t kDeafNs = kNsPerS / 2;
    const File told(fd < 0 ? -1 : ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    if (fd >= 0 && !told) deadline_ns = std::min(deadline_ns, now_ns() + kDeafNs);
    error = 0;
    for (;;) {
        const timespec left = to_timespec(std::max<std::int64_t>(0, deadline_ns - now_ns()));
        siginfo_t info{};
        const timespec none{};  // of what signalfd tells is only known that there is some
        if (::sigtimedwait(&set, &info, told ? &none : &left) >= 0) return info;
        if (errno != EAGAIN) error = errno;
        if (error != 0 || !told || now_ns() >= deadline_ns) return std::nullopt;
        pollfd ready[] = {{told.fd(), POLLIN, 0}, {fd, POLLIN, 0}};
        if (::ppoll(ready, 2, &left, nullptr) < 0) error = errno;
        if (error != 0 || ready[1].revents != 0) return std::nullopt;
    }
}

}  // namespace pepr
