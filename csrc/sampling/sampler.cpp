#include "sampling/sampler.h"

#include <stdexcept>

#include <unistd.h>

namespace pepr {

Sampler::Sampler(Lane::Options options, std::shared_ptr<Readers> readers)
    : readers_(readers != nullptr ? std::move(readers) : std::make_shared<Readers>()),
      lane_(readers_->add(std::move(options))),
      owner_pid_(::getpid()) {}

Sampler::~Sampler() {
    if (owner_pid_ == ::getpid())
        stop(kNsPerS);
    else
        readers_->leak();
}

bool Sampler::wait_ready(std::int64_t timeout_ns) const {
    const bool left = lane_->wait_while_in(State::kOpening, now_ns() + timeout_ns);
    if (left) lane_->require_open();
    return left;
}

bool Sampler::stop(std::int64_t timeout_ns) {
    return owner_pid_ == ::getpid() && readers_->stop(lane_, timeout_ns);
}

const Lane& Sampler::opened() const {
    lane_->require_open();
    return *lane_;
}

const std::vector<Channel>& Sampler::channels() const { return opened().sensor().channels(); }
const std::vector<Note>& Sampler::notes() const { return opened().sensor().notes(); }
std::size_t Sampler::width() const { return opened().ring().width(); }
std::uint64_t Sampler::unread_rows() const { return opened().ring().head() - cursor_; }
int Sampler::share(bool coarse) const {
    const Lane& lane = opened();
    if (!coarse) return lane.ring().share();
    if (lane.coarse_ring() == nullptr) throw std::logic_error("this lane has no coarse ring");
    return lane.coarse_ring()->share();
}
std::size_t Sampler::read(const Ring::Columns& out) {
    return opened().ring().read(cursor_, out, lost_);
}

}  // namespace pepr
