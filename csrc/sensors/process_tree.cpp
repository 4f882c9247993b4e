#include "sensors/process_tree.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "system/clock.h"
#include "system/numbers.h"

namespace pepr {

namespace {

constexpr std::size_t kMostProcesses = 1 << 16;  // reserved memory, touched only when used
constexpr std::size_t kMostOpen = 32;            // descriptors that a program can spare for us

// All of a file that may be long. What changes meanwhile may be missing, or there twice.
std::string read_whole(const std::string& path) {
    const File file(path);
    std::string text;
    char chunk[1 << 14];
    for (ssize_t n;
         (n = ::pread(file.fd(), chunk, sizeof chunk, static_cast<off_t>(text.size()))) > 0;)
        text.append(chunk, static_cast<std::size_t>(n));
    return text;
}

// The entries of a directory whose names are numbers.
std::vector<pid_t> numbers_in(const std::string& path) {
    std::vector<pid_t> numbers;
    visit_entries(File(path.c_str(), O_DIRECTORY), [&](const dirent64& entry) {
        if (const int number = std::atoi(entry.d_name); number > 0) numbers.push_back(number);
    });
    return numbers;
}

pid_t read_pid_max() {
    const long value = std::strtol(read_text("/proc/sys/kernel/pid_max").c_str(), nullptr, 10);
    return value > 0 ? static_cast<pid_t>(value) : 1 << 22;  // PID_MAX_LIMIT
}

}  // namespace

ProcessTree::ProcessTree(const std::vector<pid_t>& roots, pid_t left_out)
    : self_(::getpid()),
      left_out_(left_out),
      pid_max_(read_pid_max()),
      tick_s_(1.0 / static_cast<double>(::sysconf(_SC_CLK_TCK))),
      page_bytes_(static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))),
      last_pid_(moved_up(File("/proc/loadavg"))),
      own_memory_(self_ == left_out_ ? File()
                                     : moved_up(File("/proc/" + std::to_string(self_) + "/statm"))),
      searched_until_(last_pid()),
      searched_before_(searched_until_) {
    processes_.reserve(kMostProcesses);
    gone_.reserve(kMostProcesses);
    for (const pid_t root : roots)
        if (ProcessStat stat{}; read_stat(open_stat(root), root, stat) && stat.living)
            add(root, stat);
}

// --- who belongs to the tree ---------------------------------------------------------------------

std::vector<ProcessTree::Thread> ProcessTree::search() {
    std::vector<Thread> threads;
    std::vector<std::pair<pid_t, pid_t>> left;  // still to search: process, parent
    for (const Process& process : processes_) left.emplace_back(process.pid, process.seen.parent);
    while (!left.empty()) {
        const auto [process, parent] = left.back();
        left.pop_back();
        const std::string tasks = "/proc/" + std::to_string(process) + "/task/";
        for (const pid_t thread : numbers_in(tasks)) {  // none: it has exited
            threads.push_back({thread, process, thread == process ? parent : process});
            const std::string text = read_whole(tasks + std::to_string(thread) + "/children");
            const char* at = text.data();
            for (pid_t child = 0; parse_number(at, text.data() + text.size(), child);)
                if (ProcessStat stat{};
                    read_stat(open_stat(child), child, stat) && add(child, stat))
                    left.emplace_back(child, stat.parent);
        }
    }
    return threads;
}

bool ProcessTree::follow() noexcept {
    // Two calls search each pid, because a process gets its pid a moment before it can be found by
    // it.
    const pid_t from = searched_before_, last = last_pid();
    searched_before_ = searched_until_;
    searched_until_ = last;
    if (!search_between(from, last)) return false;
    // A process costs 15 µs, and more may be born meanwhile.
    searched_until_ = last_pid();
    search_between(last, searched_until_);
    return true;
}

bool ProcessTree::search_between(pid_t pid, pid_t last) noexcept {
    if (pid == last || pid < 0 || last < 0) return false;
    for_each_between(pid, last, [this](pid_t born) {
        ProcessStat stat{};
        if (find(born) == nullptr && read_stat(open_stat(born), born, stat) &&
            find(stat.parent) != nullptr)
            add(born, stat);
    });
    return true;
}

pid_t ProcessTree::last_pid() const noexcept {
    char text[128];
    const std::size_t length = last_pid_.read(text, sizeof text);
    const char* at = static_cast<const char*>(memrchr(text, ' ', length));
    pid_t pid = -1;
    return at != nullptr && parse_number(at, text + length, pid) ? pid : -1;
}

bool ProcessTree::born_after(pid_t pid, pid_t other) const noexcept {
    const pid_t distance = (pid - other + pid_max_) % pid_max_;
    return distance > 0 && distance < pid_max_ / 2;
}

std::vector<Process>::iterator ProcessTree::position_of(pid_t pid) noexcept {
    return std::lower_bound(processes_.begin(), processes_.end(), pid,
                            [](const Process& process, pid_t p) { return process.pid < p; });
}

Process* ProcessTree::find(pid_t pid) noexcept {
    const auto at = position_of(pid);
    return at != processes_.end() && at->pid == pid ? &*at : nullptr;
}

bool ProcessTree::add(pid_t pid, const ProcessStat& stat) noexcept {
    if (processes_.size() == kMostProcesses || find(pid) != nullptr) return false;
    processes_.insert(position_of(pid), Process{pid, stat});  // within what is reserved
    return true;
}

bool ProcessTree::adopt(pid_t pid) noexcept {
    ProcessStat stat{};
    return read_stat(open_stat(pid), pid, stat) && add(pid, stat);
}

pid_t ProcessTree::parent_of(pid_t pid) const noexcept {
    ProcessStat stat{};
    return read_stat(open_stat(pid), pid, stat) ? stat.parent : -1;
}

// --- what they use -------------------------------------------------------------------------------

void ProcessTree::begin() noexcept {
    refresh();
    for (Process& process : processes_) {
        process = Process{process.pid, process.seen};
        process.before_own_s = process.seen.own_s;
        process.before_waited_s = process.seen.waited_s;
    }
    ended_s_ = 0.0;
}

std::size_t ProcessTree::read_clocks(bool zombies_too) noexcept {
    std::size_t vanished = 0;
    for (Process& process : processes_) {
        vanished += process.gone;
        if (process.gone || (!process.seen.living && !zombies_too)) continue;
        const std::int64_t own_ns = read_clock_ns(cpu_clock_of(process.pid));
        // If the pid is in use again, its clock runs behind. refresh will notice.
        process.seen.own_s = std::max(process.seen.own_s, 1e-9 * static_cast<double>(own_ns));
        if (own_ns >= 0) continue;
        ++vanished;
        process.gone = true;
        process.seen.living = false;
        process.seen.rss_bytes = 0;
    }
    return vanished;
}

bool ProcessTree::refresh(std::size_t most) noexcept {
    std::size_t read = 0;
    for (std::size_t tried = 0; tried < processes_.size() && read < most; ++tried) {
        if (next_ >= processes_.size()) next_ = 0;
        if (refresh(processes_[next_++])) ++read;
    }
    return drop_gone();
}

void ProcessTree::settle(std::size_t most) noexcept {
    const Process* read = nullptr;
    for (const Process& process : processes_) {
        if (!process.gone) continue;
        Process* const parent = find(process.seen.parent);
        if (parent == nullptr || parent == read || parent->gone) continue;
        if (most-- == 0) return;  // left for refresh
        refresh(*parent);
        read = parent;
    }
    drop_gone();
}

bool ProcessTree::refresh(Process& process) noexcept {
    if (process.pid == self_) {
        read_own(process.seen, own_memory_, page_bytes_);
        process.overdue_s = process.owed_s;
        return true;
    }
    ProcessStat stat{};
    const bool keeps = processes_.size() <= kMostOpen;
    if (!process.stat) {
        File file = open_stat(process.pid);
        process.stat = keeps ? moved_up(std::move(file)) : std::move(file);
    }
    process.gone =
        !read_stat(process.stat, process.pid, stat) || stat.start_ticks != process.seen.start_ticks;
    if (!keeps) process.stat = File();
    if (process.gone) return false;
    stat.own_s = std::max(stat.own_s, process.seen.own_s);  // it may be rounded down to ticks
    process.seen = stat;
    process.overdue_s = process.owed_s;
    return true;
}

// Called after the parents were read. A process that its parent waited for between its own read and
// the parent's would otherwise count twice.
bool ProcessTree::drop_gone() noexcept {
    gone_.clear();
    for (Process& process : processes_) {
        process.gone = process.gone || read_clock_ns(cpu_clock_of(process.pid)) < 0;
        if (process.gone) gone_.push_back(&process);
    }
    if (gone_.empty()) return false;
    // Children first: their time goes up with their parents, unless these have it already.
    std::sort(gone_.begin(), gone_.end(), [this](const Process* a, const Process* b) {
        const std::uint64_t a_start = a->seen.start_ticks, b_start = b->seen.start_ticks;
        return a_start != b_start ? a_start > b_start : born_after(a->pid, b->pid);
    });
    for (const Process* process : gone_) credit_parent(*process);
    const auto kept = std::remove_if(processes_.begin(), processes_.end(),
                                     [](const Process& process) { return process.gone; });
    processes_.erase(kept, processes_.end());
    return true;
}

// The time of a process that vanished turns up in its parent's waited_s by the next read. It does
// not if the parent ignores SIGCHLD, or if an orphan's new parent is not of the tree; then we keep
// what was last seen. The kernel rounds cutime and cstime down to ticks, so that two ticks for each
// parent may stay owed forever.
void ProcessTree::credit_parent(const Process& process) noexcept {
    const double grown_s = process.grown_s();
    const double lost_s = std::max(0.0, process.overdue_s - 2 * tick_s_ - grown_s);
    const double late_s = std::max(0.0, process.owed_s - 2 * tick_s_ - grown_s - lost_s);
    const double total_s = process.seen.own_s + process.seen.waited_s + late_s;
    const double foreign_s = process.before_own_s + process.before_waited_s + process.foreign_s;
    ended_s_ += lost_s;
    if (Process* const parent = find(process.seen.parent)) {
        parent->owed_s += total_s;
        parent->foreign_s += foreign_s;
    } else {
        ended_s_ += total_s - foreign_s;
    }
}

double ProcessTree::accounted_s(const Process& process) const noexcept {
    const double own_s = process.pid == left_out_ ? 0.0 : process.seen.own_s - process.before_own_s;
    const double waited_s = std::max(process.grown_s(), process.overdue_s - 2 * tick_s_);
    return own_s + waited_s - process.foreign_s;
}

double ProcessTree::accounted_s() const noexcept {
    double sum_s = ended_s_;
    for (const Process& process : processes_) sum_s += accounted_s(process);
    return sum_s;
}

std::size_t ProcessTree::living() const noexcept {
    return static_cast<std::size_t>(
        std::count_if(processes_.begin(), processes_.end(), [this](const Process& process) {
            return process.seen.living && process.pid != left_out_;
        }));
}

std::uint64_t ProcessTree::rss_bytes() const noexcept {
    std::uint64_t sum_bytes = 0;
    for (const Process& process : processes_)
        if (process.pid != left_out_) sum_bytes += process.seen.rss_bytes;
    return sum_bytes;
}

bool ProcessTree::read_stat(const File& file, pid_t pid, ProcessStat& stat) const noexcept {
    if (!pepr::read_stat(file, pid, stat, tick_s_, page_bytes_)) return false;
    if (pid == self_) stat.waited_s = own_waited_s();
    return true;
}

}  // namespace pepr
