// A lane as its owner uses it: the constructor starts it, the owner reads its rows, stop() ends it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sampling/lane.h"
#include "sampling/readers.h"

namespace pepr {

// A thread opens the sensor, so that a driver that takes seconds (NVML without persistence mode) or
// hangs delays nobody else. Samplers with the same `readers` share threads.
class Sampler {
public:
    using State = Lane::State;
    using Stats = Lane::Stats;

    explicit Sampler(Lane::Options options, std::shared_ptr<Readers> readers = nullptr);
    ~Sampler();
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    // Waits until the sensor is open and has been read once. False if it is still opening at the
    // deadline. Throws what the sensor threw.
    bool wait_ready(std::int64_t timeout_ns) const;

    // Takes one last sample and ends the lane. False if the driver did not return in time; its
    // thread is left behind.
    bool stop(std::int64_t timeout_ns);

    State state() const noexcept { return lane_->state(); }
    const std::vector<Channel>& channels() const;
    const std::vector<Note>& notes() const;
    std::size_t read(const Ring::Columns& out);
    std::size_t latest(const Ring::Columns& out) const { return opened().ring().latest(out); }
    std::size_t width() const;
    std::uint64_t unread_rows() const;
    int share(bool coarse) const;  // Ring::share() of the ring, or of the coarse ring
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
