#pragma once

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <optional>

#include <poll.h>
#include <sys/signalfd.h>

#include "clock.h"
#include "file.h"

namespace pepr {

// A pending signal of the set, all of which this thread blocks. Nothing when CLOCK_MONOTONIC is at
// the deadline, when `fd` (-1: none) can be read, or, with EINTR in `error`, when another signal
// was handled.
inline std::optional<siginfo_t> wait_signal(const sigset_t& set, std::int64_t deadline_ns, int fd,
                                            int& error) noexcept {
    // Of what it is told only that there is some; sigtimedwait says all, also of a queued signal.
    const File told(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    error = told ? 0 : errno;
    while (error == 0) {
        const timespec none{};
        siginfo_t info{};
        if (::sigtimedwait(&set, &info, &none) >= 0) return info;
        const std::int64_t left_ns = deadline_ns - now_ns();
        if (left_ns <= 0) break;
        const timespec left = to_timespec(left_ns);
        pollfd ready[] = {{told.fd(), POLLIN, 0}, {fd, POLLIN, 0}};
        if (::ppoll(ready, 2, &left, nullptr) < 0) error = errno;
        if (ready[1].revents != 0) break;
    }
    return std::nullopt;
}

}  // namespace pepr
