#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <system_error>

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "clock.h"
#include "file.h"

namespace pepr {

// Tells whoever owns a recording that there is something to look at, so that it need not look every
// so often. Raised by any thread, any number of times; heard once.
class News {
public:
    News() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (!event_) throw std::system_error(errno, std::generic_category(), "eventfd");
    }

    void raise() const noexcept {
        const std::uint64_t one = 1;
        (void)!::write(event_.fd(), &one, sizeof one);
    }
    // Forgets what has been raised.
    void hear() const noexcept {
        std::uint64_t count;
        (void)!::read(event_.fd(), &count, sizeof count);
    }
    // False: there was none until the timeout, or a signal was handled.
    bool wait(std::int64_t timeout_ns) const noexcept {
        const timespec left = to_timespec(std::max<std::int64_t>(timeout_ns, 0));
        pollfd ready{event_.fd(), POLLIN, 0};
        return ::ppoll(&ready, 1, &left, nullptr) > 0;
    }
    int fd() const noexcept { return event_.fd(); }

private:
    File event_;
};

}  // namespace pepr
