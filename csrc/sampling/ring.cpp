#include "sampling/ring.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// Since Linux 5.1, glibc 2.29; the value is the kernel's ABI (include/uapi/linux/fcntl.h).
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace pepr {

namespace {

constexpr std::uint64_t kMagic = 0x31676e6972706570;  // "pepring1", little-endian
constexpr std::uint64_t kVersion = 1;
constexpr std::uint64_t kMostWidth = 1 << 16, kMostRows = 1 << 24;
constexpr int kKeptSize = F_SEAL_SHRINK | F_SEAL_GROW;

template <typename T>
void copy(T* to, const std::atomic<std::uint64_t>& from) noexcept {
    const std::uint64_t word = from.load(std::memory_order_acquire);
    std::memcpy(to, &word, sizeof word);
}

[[noreturn]] void fail(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
}

void refuse_unless(bool holds, const char* why) {
    if (!holds) throw std::invalid_argument(std::string("not a sample ring: ") + why);
}

}  // namespace

RingView::RingView(int fd) {
    struct stat about{};
    refuse_unless(::fstat(fd, &about) == 0, "the descriptor is not open");
    refuse_unless(S_ISREG(about.st_mode), "it is no memory file");
    // Without these seals its owner could truncate it under our mapping: reads would raise SIGBUS.
    const int seals = ::fcntl(fd, F_GET_SEALS);
    refuse_unless(seals >= 0 && (seals & kKeptSize) == kKeptSize, "its size is not sealed");
    refuse_unless(about.st_size >= static_cast<off_t>(kHeaderBytes), "it is too small");
    const auto bytes = static_cast<std::size_t>(about.st_size);
    void* memory = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
    refuse_unless(memory != MAP_FAILED, "it cannot be mapped");
    place(memory);
    // Copied once, so that we use what we have checked, whatever its owner writes later.
    const Header& header = *header_;
    const std::uint64_t magic = header.magic, version = header.version;
    const std::uint64_t width = header.width, capacity = header.capacity;
    const bool fits = width <= kMostWidth && capacity > 0 && capacity <= kMostRows &&
                      (capacity & (capacity - 1)) == 0 && bytes_of(width, capacity) == bytes;
    if (magic != kMagic || version != kVersion || !fits) {
        ::munmap(memory, bytes);
        refuse_unless(magic == kMagic, "it is something else");
        refuse_unless(version == kVersion, "it is of another version");
        refuse_unless(fits, "its size is not what its header says");
    }
    width_ = width;
    capacity_ = capacity;
}

RingView::~RingView() {
    // Without the check, a Ring whose constructor threw would unmap what is mapped at address 0.
    if (header_ != nullptr) ::munmap(header_, bytes_of(width_, capacity_));
}

std::size_t RingView::read(std::uint64_t& cursor, const Columns& out,
                           std::uint64_t& lost) const noexcept {
    const std::uint64_t head = this->head();
    if (head - cursor > capacity_) {
        lost += head - capacity_ - cursor;
        cursor = head - capacity_;
    }
    const std::size_t n = head - cursor < out.stride ? head - cursor : out.stride;
    for (std::size_t r = 0; r < n; ++r) {
        const Word* row = row_at(cursor + r);
        copy(out.t_ns + r, row[0]);
        copy(out.read_ns + r, row[1]);
        for (std::size_t c = 0; c < width_; ++c) copy(out.values + c * out.stride + r, row[2 + c]);
    }
    // The producer may have overwritten rows below reserved - capacity while we copied them.
    const std::uint64_t reserved = header_->reserved.load(std::memory_order_acquire);
    std::size_t torn = 0;
    if (reserved > cursor + capacity_) torn = reserved - capacity_ - cursor;
    if (torn > n) torn = n;
    if (torn > 0) drop_front(out, n, torn);
    lost += torn;
    cursor += n;
    return n - torn;
}

void RingView::drop_front(const Columns& out, std::size_t rows, std::size_t count) const noexcept {
    const std::size_t keep = rows - count;
    std::memmove(out.t_ns, out.t_ns + count, keep * sizeof *out.t_ns);
    std::memmove(out.read_ns, out.read_ns + count, keep * sizeof *out.read_ns);
    for (std::size_t c = 0; c < width_; ++c) {
        double* column = out.values + c * out.stride;
        std::memmove(column, column + count, keep * sizeof *column);
    }
}

std::size_t RingView::latest(const Columns& out) const noexcept {
    std::uint64_t cursor = head(), passed = 0;
    if (cursor == 0) return 0;
    --cursor;
    return read(cursor, out, passed);
}

std::uint64_t RingView::find(std::int64_t t_ns) const noexcept {
    const std::uint64_t head = this->head();
    // Leave out the oldest rows: they may be overwritten during the search.
    std::uint64_t low = head > capacity_ ? head - capacity_ + capacity_ / 16 : 0, high = head;
    const std::uint64_t oldest = low;
    while (low < high) {  // finds the first row that began later
        const std::uint64_t middle = low + (high - low) / 2;
        std::int64_t began_ns;
        copy(&began_ns, row_at(middle)[0]);
        if (began_ns <= t_ns)
            low = middle + 1;
        else
            high = middle;
    }
    return low > oldest ? low - 1 : oldest;
}

Ring::Ring(std::size_t width, std::size_t min_rows) {
    width_ = width;
    while (capacity_ < min_rows) capacity_ *= 2;
    const std::size_t bytes = bytes_of(width_, capacity_);
    file_ = moved_up(File(::memfd_create("pepr-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING)));
    if (!file_) fail("memfd_create");
    void* memory = MAP_FAILED;
    if (::ftruncate(file_.fd(), static_cast<off_t>(bytes)) == 0)
        memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_.fd(), 0);
    if (memory == MAP_FAILED) {
        const int error = errno;
        throw std::system_error(error, std::generic_category(), "mapping the sample ring");
    }
    place(new (memory) Header{kMagic, kVersion, width_, capacity_, {}, {}});
}

int Ring::share() const {
    // FUTURE_WRITE keeps our writable mapping and forbids new ones; SEAL forbids changing the
    // seals. The file mode forbids to open it for writing at all.
    constexpr int kSeals = kKeptSize | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    if ((::fcntl(file_.fd(), F_GET_SEALS) & kSeals) != kSeals &&
        (::fchmod(file_.fd(), 0444) != 0 || ::fcntl(file_.fd(), F_ADD_SEALS, kSeals) != 0))
        fail("sealing the sample ring");
    // Opened anew for each reader: a duplicate of ours would be writable.
    const std::string path = "/proc/self/fd/" + std::to_string(file_.fd());
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("opening the sample ring for a reader");
    return fd;
}

}  // namespace pepr
