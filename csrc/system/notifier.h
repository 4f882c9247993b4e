// Wakes the thread that owns a recording when it has something to do, so that it need not poll.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

#include <poll.h>
#include <fcntl.h>
#include <unistd.h>

#include "system/clock.h"
#include "system/file.h"

namespace pepr {

// Any thread may notify, any number of times; one clear() takes back all of them.
class Notifier {
public:
    Notifier() {
        std::array<int, 2> ends{-1, -1};
        (void)::pipe2(ends.data(), O_CLOEXEC);
        const File reader(ends[0]), writer(ends[1]);
        // Both ends in one: a writer alone would be killed by SIGPIPE if the program closed the
        // other. An eventfd could not be told from one of the program's.
        const std::string path = "/proc/self/fd/" + std::to_string(reader.fd());
        pipe_ = moved_up(File(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK)));
        if (!pipe_) throw std::system_error(errno, std::generic_category(), "pipe");
    }

    void notify() const noexcept {
        if (pipe_.is_ours()) (void)!::write(pipe_.fd(), "", 1);  // full: that is known already
    }
    void clear() const noexcept {
        std::array<char, 256> all;
        while (pipe_.is_ours() &&
               ::read(pipe_.fd(), all.data(), all.size()) == static_cast<ssize_t>(all.size()))
            continue;
    }
    // True once notified and not cleared since. False at the timeout, or after a signal was
    // handled.
    bool wait(std::int64_t timeout_ns) const noexcept {
        // Nobody can notify us if the program has closed it: we return soon then, to look.
        const bool ours = pipe_.is_ours();
        constexpr std::int64_t kSoon = 250'000'000;
        if (!ours) timeout_ns = std::min(timeout_ns, kSoon);
        const timespec left = to_timespec(std::max<std::int64_t>(timeout_ns, 0));
        pollfd ready{pipe_.fd(), POLLIN, 0};
        return ::ppoll(&ready, ours ? 1 : 0, &left, nullptr) > 0;
    }
    int fd() const noexcept { return pipe_.fd(); }

private:
    File pipe_;
};

}  // namespace pepr
