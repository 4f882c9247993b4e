#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sampling/lane.h"
#include "sampling/readers.h"

namespace pepr {

// A lane as its owner has it: begun with it, read from its ring, and ended with it. Its sensor is
// opened by a thread, so that a driver that takes seconds to wake (NVML without persistence mode)
// or hangs delays nobody else. Without `readers` it has a thread of its own.
class Sampler {
public:
    using State = Lane::State;
    using Stats = Lane::Stats;

    explicit Sampler(Lane::How how, std::shared_ptr<Readers> readers = nullptr);
    ~Sampler();
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    // Waits until the sensor is open and has been read once. False: still opening at the deadline.
    // Throws what the sensor threw.
    bool wait_ready(std::int64_t timeout_ns) const;

    // Takes one last sample and ends the lane. False: the driver did not return in time; its thread
    // is left behind.
    bool stop(std::int64_t timeout_ns);

    State state() const noexcept { return lane_->state(); }
    const std::vector<Channel>& channels() const;
    const std::vector<Note>& notes() const;
    std::size_t read(const Ring::Columns& out);
    std::size_t latest(const Ring::Columns& out) const { return opened().ring().latest(out); }
    std::size_t width() const;
    std::uint64_t waiting() const;  // rows that read() has not given yet
    int share(bool coarse) const;   // a reader's descriptor of the ring, or of the coarse one
    Stats stats() const noexcept { return lane_->stats(lost_); }
    std::shared_ptr<const Lane> lane() const noexcept { return lane_; }

private:
    const Lane& opened() const;

    const std::shared_ptr<Readers> readers_;
    const std::shared_ptr<Lane> lane_;
    const int owner_pid_;
    std::uint64_t cursor_ = 0;
    std::uint64_t lost_ = 0;
};

}  // namespace pepr
