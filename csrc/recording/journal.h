#pragma once

#include <cstdint>
#include <memory>

#include "recording/lane_file.h"
#include "sampling/lane.h"
#include "system/notifier.h"

namespace pepr {

// Writes lanes to disk while they are recorded, once in `period_ns` and from a thread of its own:
// neither a driver nor a disk that hangs keeps the other, and a program that records itself does
// none of it. The notifier is notified when a write begins to fail, and when it works again.
class Journal {
public:
    Journal(std::int64_t period_ns, std::shared_ptr<Notifier> notifier);
    ~Journal();
    Journal(const Journal&) = delete;
    Journal& operator=(const Journal&) = delete;

    // From now on the file has what the lane reads. The lane is open.
    void add(std::shared_ptr<const Lane> lane, std::shared_ptr<LaneFile> file);

    // Writes what the lanes have read until now, by the calling thread.
    void flush();

    // Ends the thread; what is read from now on is written by `flush` alone.
    void stop();

    // CPU time that its thread has used.
    std::int64_t cpu_ns() const noexcept;

private:
    struct State;
    const std::shared_ptr<State> state_;
    const int owner_pid_;
};

}  // namespace pepr
