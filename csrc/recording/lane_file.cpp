#include "recording/lane_file.h"

#include <algorithm>
#include <cerrno>
#include <utility>

namespace pepr {

namespace {

// Rows of a finished batch: large enough that its 400 bytes of header do not matter.
constexpr std::size_t kBatchRows = 1024;

// Rows that are taken from a ring and written at a time: their memory is ours for ever.
constexpr std::size_t kDrainRows = 256;

// What the tail may hold before its rows are moved: a flush costs 50 bytes a channel beside its
// numbers, and who uses 64 GPUs is told by 3,000 channels.
constexpr std::size_t kTailBytes = 1 << 24;

// Rows at the beginning of a lane that are all kept: refresh periods are learnt from them.
constexpr std::size_t kWholeRows = 256;

// What a full disk may keep waiting in memory before rows are dropped: 2 min at 1 kHz.
constexpr std::size_t kMostPendingRows = 1 << 17;

using Lock = std::lock_guard<std::mutex>;

// 4.3 s is long; a read or a gap that outlasts it shows in t_ns too.
std::uint32_t short_ns(std::int64_t ns) noexcept {
    return static_cast<std::uint32_t>(std::clamp<std::int64_t>(ns, 0, UINT32_MAX));
}

template <typename T>
void make_room(std::vector<T>& column, std::size_t more) {
    const std::size_t size = column.size() + more;
    if (size > column.capacity()) column.reserve(std::max(size, 2 * column.capacity()));
}

template <typename T>
std::vector<T> pick(const std::vector<T>& column, const std::vector<std::size_t>& rows) {
    std::vector<T> picked;
    picked.reserve(rows.size());
    for (const std::size_t row : rows) picked.push_back(column[row]);
    return picked;
}

}  // namespace

LaneFile::LaneFile(How how)
    : how_(std::move(how)),
      main_(how_.stem + ".arrows", how_.schema),
      tail_(how_.stem + ".tail.arrows", how_.schema),
      whole_(kWholeRows) {}

void LaneFile::append(const RingView::Columns& columns, std::size_t rows) {
    const Lock lock(mutex_);
    make_room(rows);
    keep(columns, rows);
}

void LaneFile::drain(const RingView& ring) {
    const Lock lock(mutex_);
    while (ring.head() != cursor_) {
        const auto rows = std::min<std::size_t>(ring.head() - cursor_, kDrainRows);
        ring_t_ns_.resize(rows);
        ring_read_ns_.resize(rows);
        columns_.resize(rows * width());
        make_room(rows);
        const RingView::Columns out{ring_t_ns_.data(), ring_read_ns_.data(), columns_.data(), rows};
        std::uint64_t lost = 0;
        keep(out, ring.read(cursor_, out, lost));
        lost_ += lost;
        if (error_ == 0) write();
    }
}

// Where there is no memory, the ring has the rows still, and no column is longer than another.
void LaneFile::make_room(std::size_t rows) {
    pepr::make_room(t_ns_, rows);
    pepr::make_room(read_ns_, rows);
    pepr::make_room(since_read_ns_, rows);
    pepr::make_room(values_, rows * width());
}

void LaneFile::keep(const RingView::Columns& columns, std::size_t rows) {
    for (std::size_t r = 0; r < rows; ++r) {
        const std::int64_t t_ns = columns.t_ns[r];
        t_ns_.push_back(t_ns);
        read_ns_.push_back(short_ns(columns.read_ns[r]));
        since_read_ns_.push_back(short_ns(t_ns - last_ns_.value_or(t_ns)));
        for (std::size_t c = 0; c < width(); ++c)
            values_.push_back(columns.values[c * columns.stride + r]);
        last_ns_ = t_ns;
    }
}

void LaneFile::flush(bool last) {
    const Lock lock(mutex_);
    write();
    if (last) end();
}

void LaneFile::write() {
    const std::size_t n = t_ns_.size() - in_tail_;
    if (n == 0) return;
    transpose(in_tail_, columns_);
    const std::vector<std::uint32_t> skipped(n);
    std::vector<ArrowColumn> columns{{&t_ns_[in_tail_], sizeof t_ns_[0]},
                                     {&read_ns_[in_tail_], sizeof read_ns_[0]},
                                     {skipped.data(), sizeof skipped[0]},
                                     {&since_read_ns_[in_tail_], sizeof since_read_ns_[0]}};
    for (std::size_t c = 0; c < width(); ++c)
        columns.push_back({&columns_[c * n], sizeof columns_[0]});
    messages_.clear();
    append_batch(messages_, columns, n);
    if (attempt(tail_.append(messages_))) in_tail_ = t_ns_.size();
    if (t_ns_.size() >= kBatchRows || tail_.size() >= kTailBytes) consolidate();
}

void LaneFile::end() {
    if (!t_ns_.empty()) consolidate();
    if (t_ns_.empty()) {
        attempt(main_.finish());
        tail_.remove();  // left behind it does no harm: a reader drops what it has seen
    } else {
        if (error_ == ENOSPC || error_ == EDQUOT) squeeze();
        give_up();
    }
    main_.close();
    tail_.close();
}

// The rows from `first` on, column by column.
void LaneFile::transpose(std::size_t first, std::vector<double>& columns) const {
    const std::size_t n = t_ns_.size() - first;
    columns.resize(n * width());
    for (std::size_t r = 0; r < n; ++r)
        for (std::size_t c = 0; c < width(); ++c)
            columns[c * n + r] = values_[(first + r) * width() + c];
}

void LaneFile::consolidate() {
    const std::size_t n = t_ns_.size();
    std::vector<double> columns;  // ours alone: of a lane with many channels it is megabytes
    transpose(0, columns);
    learn(columns);
    const auto rows = thin(how_.rules, t_ns_.data(), columns.data(), n, n, whole_);
    if (attempt(main_.append(batch_of(rows, true)))) {
        whole_ -= std::min(whole_, n);
        forget();
        (void)tail_.clear();
    } else if (n > kMostPendingRows) {
        give_up();
    }
}

// A counter that is read more seldom while power is steady keeps to a line as close as at first.
void LaneFile::learn(const std::vector<double>& columns) {
    const std::size_t n = t_ns_.size();
    for (std::size_t c = 0; c < width(); ++c)
        if (ThinRule& rule = how_.rules[c];
            rule.kind == ThinRule::Kind::kLine && rule.most_usual_s == 0.0)
            rule.most_usual_s = first_interval_s(&columns[c * n], t_ns_.data(), n);
}

// `thinned`: what lies between these rows is known from them, else it is lost.
std::string LaneFile::batch_of(const std::vector<std::size_t>& rows, bool thinned) const {
    std::vector<std::uint32_t> skipped(rows.size());
    for (std::size_t i = 1; thinned && i < rows.size(); ++i)
        skipped[i] = static_cast<std::uint32_t>(rows[i] - rows[i - 1] - 1);
    const auto t_ns = pick(t_ns_, rows);
    const auto read_ns = pick(read_ns_, rows), since_read_ns = pick(since_read_ns_, rows);
    std::vector<double> kept(rows.size() * width());
    std::vector<ArrowColumn> columns{{t_ns.data(), sizeof t_ns[0]},
                                     {read_ns.data(), sizeof read_ns[0]},
                                     {skipped.data(), sizeof skipped[0]},
                                     {since_read_ns.data(), sizeof since_read_ns[0]}};
    for (std::size_t c = 0; c < width(); ++c) {
        double* const column = kept.data() + c * rows.size();
        for (std::size_t i = 0; i < rows.size(); ++i) column[i] = values_[rows[i] * width() + c];
        columns.push_back({column, sizeof *column});
    }
    std::string batch;
    append_batch(batch, columns, rows.size());
    return batch;
}

void LaneFile::forget() noexcept {
    t_ns_.clear();
    read_ns_.clear();
    since_read_ns_.clear();
    values_.clear();
    in_tail_ = 0;
}

// Writes fewer rows, from all of the time and with the last, over those of the tail: that room is
// ours, whoever waits for some. Half of it is for lanes that have none, as of what is free.
void LaneFile::squeeze() {
    const std::size_t n = t_ns_.size(), row_bytes = 20 + 8 * width();
    const bool over = in_tail_ > 0;
    std::size_t count = std::min(n, (over ? tail_.size() : main_.free_bytes()) / 2 / row_bytes);
    for (; count > 0 && !t_ns_.empty(); count /= 2) {
        std::vector<std::size_t> rows{n - 1};
        for (std::size_t left = count - 1; left > 0; --left)
            rows.push_back((left - 1) * (n - 1) / (count - 1));
        std::reverse(rows.begin(), rows.end());
        const std::string batch = batch_of(rows, false);
        if (!attempt(over ? tail_.replace(batch) : main_.append(batch))) continue;
        dropped_ += n - count;
        forget();
    }
}

// Lets go of the rows that no file holds.
void LaneFile::give_up() {
    dropped_ += t_ns_.size() - in_tail_;
    t_ns_.resize(in_tail_);
    read_ns_.resize(in_tail_);
    since_read_ns_.resize(in_tail_);
    values_.resize(in_tail_ * width());
}

bool LaneFile::attempt(int error) noexcept {
    error_ = error;
    return error == 0;
}

}  // namespace pepr
