// Which processes compute on each NVIDIA GPU, and how much of it each of them used.
//
// A lane of its own: these calls may be slow, and one that hangs must not cost a joule. Processes
// come and go while a lane's channels are fixed, so each GPU has slots; a process keeps its slot
// for as long as it is seen. Whose process it is, Python finds out while it lives.

#include <algorithm>
#include <array>
#include <vector>

#include "sensors/nvml_library.h"

namespace pepr {

namespace {

constexpr std::size_t kSlots = 16;  // a GPU; more than that is told by the count
constexpr std::size_t kMost = 256;  // processes of a GPU that are looked at
constexpr auto kNotAvailable = static_cast<unsigned long long>(NVML_VALUE_NOT_AVAILABLE);
constexpr unsigned kMaxPercent = 100;  // drivers have been seen to answer more, which is garbage

struct Slot {
    unsigned pid = 0;  // 0: free
    bool seen = false;
    double sm = 0.0, bytes = 0.0, instance = 0.0;
};

struct Gpu : nvml::Board {
    std::array<Slot, kSlots> slots{};
    double count = 0.0;
    bool measures_use = false;
    unsigned long long last_seen_us = 0;  // the newest sample so far, by the driver's clock
};

class NvmlProcesses final : public Sensor {
public:
    explicit NvmlProcesses(const std::string& where) : library_(where) {
        const unsigned count = library_.start();
        for (unsigned index = 0; index < count; ++index) {
            Gpu gpu{};
            // One that does not open is told by whoever reads its energy.
            if (nvml::open_board(library_, index, gpu) == NVML_SUCCESS) describe(gpu);
        }
        if (gpus_.empty()) throw nvml::nothing_found(notes_);
    }

    void poll(double* out) noexcept override {
        for (Gpu& gpu : gpus_) {
            const bool listed = look(gpu);
            *out++ = listed ? gpu.count : kUnknown;
            for (const Slot& slot : gpu.slots) {
                *out++ = listed ? slot.pid : kUnknown;
                *out++ = listed ? slot.bytes : kUnknown;
                if (gpu.measures_use) *out++ = listed ? slot.sm : kUnknown;
                if (gpu.mig) *out++ = listed ? slot.instance : kUnknown;
            }
        }
    }

private:
    void describe(Gpu& gpu) {
        const std::string of_gpu = " of GPU " + gpu.labels["index"];
        unsigned room = kMost;
        const nvmlReturn_t listed = library_.processes
                                        ? library_.processes(gpu.device, &room, infos_.data())
                                        : NVML_ERROR_FUNCTION_NOT_FOUND;
        if (nvml::never(listed)) {
            Note note = library_.note("processes" + of_gpu, listed);
            note.fix = "none: its driver does not list them";
            notes_.push_back(std::move(note));
            return;
        }
        // Asked for nothing older than now, so that the first row is not about the past.
        gpu.measures_use = !gpu.mig && library_.process_utilisation && !nvml::never(use_of(gpu));
        const auto add = [&](const std::string& name, const char* quantity, const char* unit,
                             double scale, const char* source) {
            channels_.push_back({gpu.labels["uuid"] + "/" + name, quantity, unit, scale, 0.0, false,
                                 source, gpu.labels});
        };
        add("processes", "count", "1", 1.0, "nvml-processes");
        for (std::size_t i = 0; i < kSlots; ++i) {
            const std::string slot = std::to_string(i);
            add("pid" + slot, "identity", "1", 1.0, "nvml-processes");
            add("memory" + slot, "memory", "B", 1.0, "nvml-process-memory");
            if (gpu.measures_use)
                add("sm" + slot, "utilisation", "1", 0.01, "nvml-process-utilisation");
            if (gpu.mig) add("instance" + slot, "identity", "1", 1.0, "nvml-processes");
        }
        gpus_.push_back(std::move(gpu));
    }

    bool look(Gpu& gpu) noexcept {
        unsigned count = kMost;
        samples_used_ = 0;
        if (library_.processes(gpu.device, &count, infos_.data()) != NVML_SUCCESS) return false;
        if (gpu.measures_use) use_of(gpu);
        const unsigned listed = std::min<unsigned>(count, kMost);
        gpu.count = count;
        for (Slot& slot : gpu.slots) slot.seen = false;
        each_pid(listed, [&](unsigned pid) {
            if (Slot* const slot = slot_of(gpu, pid)) slot->seen = true;
        });
        for (Slot& slot : gpu.slots) slot = {slot.seen ? slot.pid : 0};
        each_pid(listed, [&](unsigned pid) {
            if (slot_of(gpu, pid) != nullptr) return;
            if (Slot* const slot = slot_of(gpu, 0)) slot->pid = pid;
        });
        for (unsigned i = 0; i < listed; ++i) {
            const nvmlProcessInfo_t& info = infos_[i];
            Slot* const slot = slot_of(gpu, info.pid);
            if (slot == nullptr) continue;
            slot->bytes += info.usedGpuMemory == kNotAvailable
                               ? kUnknown
                               : static_cast<double>(info.usedGpuMemory);
            slot->instance = info.gpuInstanceId;
        }
        // Samples of one process add up: a driver that tells them one by one leaves out the zeros.
        for (unsigned i = 0; i < samples_used_; ++i)
            if (Slot* const slot = slot_of(gpu, samples_[i].pid)) slot->sm += samples_[i].smUtil;
        return true;
    }

    // A process that has ended is no longer listed, but its last samples are its own.
    template <typename Visit>
    void each_pid(unsigned listed, Visit visit) noexcept {
        for (unsigned i = 0; i < listed; ++i) visit(infos_[i].pid);
        for (unsigned i = 0; i < samples_used_; ++i) visit(samples_[i].pid);
    }

    // Each process's mean SM utilisation since the call before, in samples_; NOT_FOUND where none
    // computed or no sample has been taken since.
    nvmlReturn_t use_of(Gpu& gpu) noexcept {
        unsigned count = kMost;
        const nvmlReturn_t code =
            library_.process_utilisation(gpu.device, samples_.data(), &count, gpu.last_seen_us);
        samples_used_ = 0;
        if (code != NVML_SUCCESS) return code;
        for (unsigned i = 0; i < std::min<unsigned>(count, kMost); ++i) {
            gpu.last_seen_us = std::max(gpu.last_seen_us, samples_[i].timeStamp);
            if (samples_[i].pid != 0 && samples_[i].smUtil <= kMaxPercent)
                samples_[samples_used_++] = samples_[i];
        }
        return NVML_SUCCESS;
    }

    static Slot* slot_of(Gpu& gpu, unsigned pid) noexcept {
        const auto has = [pid](const Slot& slot) { return slot.pid == pid; };
        const auto found = std::find_if(gpu.slots.begin(), gpu.slots.end(), has);
        return found == gpu.slots.end() ? nullptr : &*found;
    }

    nvml::Library library_;
    std::vector<Gpu> gpus_;
    std::array<nvmlProcessInfo_t, kMost> infos_{};
    std::array<nvmlProcessUtilizationSample_t, kMost> samples_{};
    unsigned samples_used_ = 0;
};

}  // namespace

std::unique_ptr<Sensor> open_nvml_processes(const std::string& where) {
    return std::make_unique<NvmlProcesses>(where);
}

}  // namespace pepr
