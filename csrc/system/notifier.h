// Wakes the thread that owns a recording when it has something to do, so that it need not poll.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <system_error>

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "system/clock.h"
#include "system/file.h"

namespace pepr {

// Any thread may notify, any number of times; one clear() takes back all of them.
class Notifier {
public:
    Notifier() : event_(moved_up(File(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)))) {
        if (!event_) throw std::system_error(errno, std::generic_category(), "eventfd");
    }

    void notify() const noexcept {
        const std::uint64_t one = 1;
        if (event_.is_ours()) (void)!::write(event_.fd(), &one, sizeof one);
    }
    void clear() const noexcept {
        std::uint64_t count;
        if (event_.is_ours()) (void)!::read(event_.fd(), &count, sizeof count);
    }
    // True once notified and not cleared since. False at the timeout, or after a signal was
    // handled.
    bool wait(std::int64_t timeout_ns) const noexcept {
        // Nobody can notify us if the program has closed it: we return soon then, to look.
        const bool ours = event_.is_ours();
        constexpr std::int64_t kSoon = 250'000'000;
        if (!ours) timeout_ns = std::min(timeout_ns, kSoon);
        const timespec left = to_timespec(std::max<std::int64_t>(timeout_ns, 0));
        pollfd ready{event_.fd(), POLLIN, 0};
        return ::ppoll(&ready, ours ? 1 : 0, &left, nullptr) > 0;
    }
    int fd() const noexcept { return event_.fd(); }

private:
    File event_;
};

}  // namespace pepr
