#include "sensors/marked_processes.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "system/file.h"

namespace pepr {

namespace {

constexpr std::size_t kLongest = 1 << 17;  // of an environment; more of it is not searched
constexpr std::size_t kReadsPerSample = 24;

}  // namespace

MarkedProcesses::MarkedProcesses(const std::string& mark)
    : mark_(std::string(1, '\0') + mark + '\0'), text_(new char[kLongest]), found_({}, 0) {
    last_pids_.fill(found_.last_pid());
}

void MarkedProcesses::follow(ProcessTree& tree) noexcept {
    std::copy_backward(last_pids_.begin(), last_pids_.end() - 1, last_pids_.end());
    last_pids_[0] = tree.followed_until();
    search_between(last_pids_[2], last_pids_[1], tree);
    search_between(last_pids_[kLate + 1], last_pids_[kLate], tree);
}

void MarkedProcesses::search_between(pid_t pid, pid_t last, ProcessTree& tree) noexcept {
    found_.for_each_between(pid, last, [&](pid_t born) { adopt(born, tree); });
}

// Adopts a process, and those above it that bear the mark: one that is found later than a child of
// its own would have the time of that child once more. What a process of ours starts with another
// environment is ours too.
void MarkedProcesses::adopt(pid_t pid, ProcessTree& tree) noexcept {
    while (!tree.has(pid) && !found_.has(pid)) {
        const bool is_marked = bears_mark(pid);
        if (!is_marked && found_.processes().empty()) return;
        const pid_t parent = found_.parent_of(pid);
        if (parent < 0 || tree.has(parent) || (!is_marked && !found_.has(parent))) return;
        found_.adopt(pid);
        pid = parent;
    }
}

bool MarkedProcesses::bears_mark(pid_t pid) noexcept {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/%d/environ", pid);
    // The first variable has a NUL before it too, and the last one may lack that behind it.
    text_[0] = '\0';
    const std::size_t length = File(path).read(text_.get() + 1, kLongest - 1);
    return ::memmem(text_.get(), length + 2, mark_.data(), mark_.size()) != nullptr;
}

double MarkedProcesses::read_s() noexcept {
    const bool vanished = found_.read_clocks(true) > 0;
    if (vanished || unsettled_)
        unsettled_ = found_.refresh();
    else
        found_.refresh(kReadsPerSample);
    return found_.accounted_s();
}

}  // namespace pepr
