// The thread that writes lanes to disk while they are recorded.
#pragma once

#include <cstdint>
#include <memory>

#include "recording/lane_file.h"
#include "sampling/lane.h"
#include "system/notifier.h"

namespace pepr {

// It writes once in `period_ns`, and more often while lanes have just been added. In a thread of
// its own, a disk that hangs does not delay the drivers nor the reverse, and a program that records
// itself spends no time on it. The notifier is notified when writes begin to fail, and when they
// work again.
class Journal {
public:
    Journal(std::int64_t period_ns, std::shared_ptr<Notifier> notifier);
    ~Journal();
    Journal(const Journal&) = delete;
    Journal& operator=(const Journal&) = delete;

    // From now on writes the rows of the lane, which must be open, to the file.
    void add(std::shared_ptr<const Lane> lane, std::shared_ptr<LaneFile> file);

    // Writes what the lanes have read until now, in the calling thread.
    void flush();

    // Ends the thread. From now on only flush() writes.
    void stop();

    // The CPU time of its thread.
    std::int64_t cpu_ns() const noexcept;

private:
    struct State;
    const std::shared_ptr<State> state_;
    const int owner_pid_;
};

}  // namespace pepr
