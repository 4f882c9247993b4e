// Which processes compute on each NVIDIA GPU, and how much of it each of them uses.
//
// This is a sensor of its own, because these calls may be slow or hang, and energy readings must
// not wait for them. Processes come and go while the channels of a sensor are fixed, so each GPU
// has a number of slots. A process keeps its slot while it is seen. Python finds out whose it is.

#include <algorithm>
#include <array>
#include <vector>

#include "sensors/nvml_library.h"

namespace pepr {

namespace {

constexpr std::size_t kSlots = 16;           // for each GPU; the count may be higher
constexpr std::size_t kMostProcesses = 256;  // read of one GPU
constexpr auto kNotAvailable = static_cast<unsigned long long>(NVML_VALUE_NOT_AVAILABLE);
constexpr unsigned kMaxPercent = 100;  // some drivers return more, which is garbage

struct Slot {
    unsigned pid = 0;  // 0: free
    bool seen = false;
    double sm_percent = 0.0, bytes = 0.0, instance = 0.0;
};

struct Gpu : nvml::Board {
    std::array<Slot, kSlots> slots{};
    double count = 0.0;
    bool has_utilisation = false;
    unsigned long long last_sample_us = 0;  // by the driver's clock
};

class NvmlProcesses final : public Sensor {
public:
    explicit NvmlProcesses(const std::string& where) : library_(where) {
        const unsigned count = library_.start();
        for (unsigned index = 0; index < count; ++index) {
            Gpu gpu{};
            // The sensor that reads its energy reports a board that does not open.
            if (nvml::open_board(library_, index, gpu) == NVML_SUCCESS) describe(gpu);
        }
        if (gpus_.empty()) throw nvml::nothing_found(notes_);
    }

    void poll(double* out) noexcept override {
        for (Gpu& gpu : gpus_) {
            const bool listed = read_processes(gpu);
            *out++ = listed ? gpu.count : kUnknown;
            for (const Slot& slot : gpu.slots) {
                *out++ = listed ? slot.pid : kUnknown;
                *out++ = listed ? slot.bytes : kUnknown;
                if (gpu.has_utilisation) *out++ = listed ? slot.sm_percent : kUnknown;
                if (gpu.mig) *out++ = listed ? slot.instance : kUnknown;
            }
        }
    }

private:
    void describe(Gpu& gpu) {
        const std::string of_gpu = " of GPU " + gpu.labels["index"];
        unsigned room = kMostProcesses;
        const nvmlReturn_t listed = library_.processes
                                        ? library_.processes(gpu.device, &room, infos_.data())
                                        : NVML_ERROR_FUNCTION_NOT_FOUND;
        if (nvml::is_permanent(listed)) {
            Note note = library_.note("processes" + of_gpu, listed);
            note.fix = "none: its driver does not list them";
            notes_.push_back(std::move(note));
            return;
        }
        // This read also skips older samples, so that the first row is not about the past.
        gpu.has_utilisation =
            !gpu.mig && library_.process_utilisation && !nvml::is_permanent(read_utilisation(gpu));
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
            if (gpu.has_utilisation)
                add("sm" + slot, "utilisation", "1", 0.01, "nvml-process-utilisation");
            if (gpu.mig) add("instance" + slot, "identity", "1", 1.0, "nvml-processes");
        }
        gpus_.push_back(std::move(gpu));
    }

    // Updates the slots. False if the driver does not list its processes now.
    bool read_processes(Gpu& gpu) noexcept {
        unsigned count = kMostProcesses;
        samples_used_ = 0;
        if (library_.processes(gpu.device, &count, infos_.data()) != NVML_SUCCESS) return false;
        count += read_mps_clients(gpu, std::min<unsigned>(count, kMostProcesses));
        if (gpu.has_utilisation) read_utilisation(gpu);
        const unsigned listed = std::min<unsigned>(count, kMostProcesses);
        gpu.count = count;
        for (Slot& slot : gpu.slots) slot.seen = false;
        for_each_pid(listed, [&](unsigned pid) {
            if (Slot* const slot = slot_of(gpu, pid)) slot->seen = true;
        });
        for (Slot& slot : gpu.slots) slot = {slot.seen ? slot.pid : 0};
        for_each_pid(listed, [&](unsigned pid) {
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
        // A driver may return several samples of one process, without those that are 0: add them.
        for (unsigned i = 0; i < samples_used_; ++i)
            if (Slot* const slot = slot_of(gpu, samples_[i].pid))
                slot->sm_percent += samples_[i].smUtil;
        return true;
    }

    // Adds clients of MPS behind the `listed` processes, which may have their server only, unless
    // they are among these. Returns how many.
    unsigned read_mps_clients(Gpu& gpu, unsigned listed) noexcept {
        unsigned count = kMostProcesses - listed, added = 0;
        if (count == 0 || library_.mps_processes == nullptr) return 0;
        nvmlProcessInfo_t* const clients = infos_.data() + listed;
        if (library_.mps_processes(gpu.device, &count, clients) != NVML_SUCCESS) return 0;
        for (unsigned i = 0; i < std::min<unsigned>(count, kMostProcesses - listed); ++i) {
            const auto is_it = [&](const nvmlProcessInfo_t& info) {
                return info.pid == clients[i].pid;
            };
            if (std::any_of(infos_.data(), clients + added, is_it)) continue;
            clients[added++] = clients[i];
        }
        return added;
    }

    // Visits the listed processes, and those that have ended but left samples.
    template <typename Visit>
    void for_each_pid(unsigned listed, Visit visit) noexcept {
        for (unsigned i = 0; i < listed; ++i) visit(infos_[i].pid);
        for (unsigned i = 0; i < samples_used_; ++i) visit(samples_[i].pid);
    }

    // Reads each process's mean SM utilisation since the last call into samples_. NOT_FOUND if none
    // computed, or if the driver took no sample since.
    nvmlReturn_t read_utilisation(Gpu& gpu) noexcept {
        unsigned count = kMostProcesses;
        const nvmlReturn_t code =
            library_.process_utilisation(gpu.device, samples_.data(), &count, gpu.last_sample_us);
        samples_used_ = 0;
        if (code != NVML_SUCCESS) return code;
        for (unsigned i = 0; i < std::min<unsigned>(count, kMostProcesses); ++i) {
            gpu.last_sample_us = std::max(gpu.last_sample_us, samples_[i].timeStamp);
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
    std::array<nvmlProcessInfo_t, kMostProcesses> infos_{};
    std::array<nvmlProcessUtilizationSample_t, kMostProcesses> samples_{};
    unsigned samples_used_ = 0;
};

}  // namespace

std::unique_ptr<Sensor> open_nvml_processes(const std::string& where) {
    return std::make_unique<NvmlProcesses>(where);
}

}  // namespace pepr
