// Loads NVIDIA's driver library at run time: the same build runs with and without a driver.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <nvml.h>

#include "sensors/sensor.h"

namespace pepr::nvml {

constexpr const char* kUsualLibrary = "libnvidia-ml.so.1";

inline std::string remedy(nvmlReturn_t code) {
    switch (code) {
        case NVML_ERROR_DRIVER_NOT_LOADED: return "load it: sudo modprobe nvidia";
        case NVML_ERROR_NO_PERMISSION:
            return "give this user access to /dev/nvidia* (group video or render)";
        case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return "the library is newer than the loaded kernel module: reboot, or reload the "
                   "nvidia modules";
        case NVML_ERROR_GPU_IS_LOST:
        case NVML_ERROR_RESET_REQUIRED: return "reset the GPU (nvidia-smi --gpu-reset) or reboot";
        default: return "see that nvidia-smi works";
    }
}

// The library and its functions. Macros of nvml.h rename a function to its newest version, so each
// is looked up by its real name. One that the driver is too old for is null.
struct Library {
    // Loads the library at path `where`, or the usual one if it is empty. Throws SensorError.
    explicit Library(const std::string& where)
        : path(where.empty() ? kUsualLibrary : where),
          handle(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (handle == nullptr) {
            const char* const reason = ::dlerror();
            throw SensorError("no NVIDIA driver library", reason != nullptr ? reason : path,
                              "install the NVIDIA driver; in a container, start it with GPU access "
                              "(docker run --gpus all)");
        }
        if (!init || !shutdown || !count || !by_index || !uuid)
            throw SensorError(path + " is not a usable NVML",
                              "it lacks calls that every driver since 2013 has",
                              "check the path after nvml:, or update the driver");
    }
    ~Library() {
        if (started) shutdown();
        if (handle != nullptr) ::dlclose(handle);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    struct Symbol {
        void* address;
        template <typename F>
        operator F*() const {
            return reinterpret_cast<F*>(address);
        }
    };
    // Starts NVML and returns the number of GPUs. Throws SensorError.
    unsigned start() {
        check(init(), "NVML does not start");
        started = true;
        unsigned gpus = 0;
        check(count(&gpus), "NVML does not count its GPUs");
        return gpus;
    }

    Symbol find(const char* symbol) const { return {handle ? ::dlsym(handle, symbol) : nullptr}; }

    void check(nvmlReturn_t code, const std::string& what) const {
        if (code != NVML_SUCCESS) throw SensorError(note(what, code));
    }

    Note note(const std::string& what, nvmlReturn_t code) const {
        const std::string text = error_string ? error_string(code) : "NVML error";
        const std::string why = text + " (" + std::to_string(static_cast<int>(code)) + ")";
        if (code == NVML_ERROR_NO_PERMISSION) return denied(what, why, remedy(code));
        return {what, why, remedy(code)};
    }

    std::string path;
    void* handle = nullptr;
    bool started = false;
    decltype(&nvmlInit_v2) init = find("nvmlInit_v2");
    decltype(&nvmlShutdown) shutdown = find("nvmlShutdown");
    decltype(&nvmlErrorString) error_string = find("nvmlErrorString");
    decltype(&nvmlDeviceGetCount_v2) count = find("nvmlDeviceGetCount_v2");
    decltype(&nvmlDeviceGetHandleByIndex_v2) by_index = find("nvmlDeviceGetHandleByIndex_v2");
    decltype(&nvmlDeviceGetUUID) uuid = find("nvmlDeviceGetUUID");
    decltype(&nvmlDeviceGetName) name = find("nvmlDeviceGetName");
    decltype(&nvmlDeviceGetTotalEnergyConsumption) energy =
        find("nvmlDeviceGetTotalEnergyConsumption");
    decltype(&nvmlDeviceGetPowerUsage) power = find("nvmlDeviceGetPowerUsage");
    decltype(&nvmlDeviceGetFieldValues) fields = find("nvmlDeviceGetFieldValues");
    decltype(&nvmlDeviceGetUtilizationRates) utilisation = find("nvmlDeviceGetUtilizationRates");
    decltype(&nvmlDeviceGetMemoryInfo) memory = find("nvmlDeviceGetMemoryInfo");
    decltype(&nvmlDeviceGetPowerManagementLimitConstraints) limits =
        find("nvmlDeviceGetPowerManagementLimitConstraints");
    decltype(&nvmlDeviceGetEnforcedPowerLimit) enforced_limit =
        find("nvmlDeviceGetEnforcedPowerLimit");
    decltype(&nvmlDeviceGetMigMode) mig = find("nvmlDeviceGetMigMode");
    decltype(&nvmlDeviceGetComputeRunningProcesses_v3) processes =
        find("nvmlDeviceGetComputeRunningProcesses_v3");
    decltype(&nvmlDeviceGetProcessUtilization) process_utilisation =
        find("nvmlDeviceGetProcessUtilization");
};

// Whether a call that failed so will always fail. Others may work again (a lost GPU, a time-out).
inline bool is_permanent(nvmlReturn_t code) noexcept {
    return code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_FUNCTION_NOT_FOUND ||
           code == NVML_ERROR_INVALID_ARGUMENT || code == NVML_ERROR_NO_PERMISSION;
}

// The error for a sensor that found nothing to read.
inline SensorError nothing_found(const std::vector<Note>& notes) {
    if (!notes.empty()) return SensorError(notes[0]);
    return {"no NVIDIA GPU", "the driver runs but sees no device",
            "check nvidia-smi -L, and NVIDIA_VISIBLE_DEVICES in a container"};
}

// A GPU's handle and names, read once when a sensor opens.
struct Board {
    nvmlDevice_t device = nullptr;
    std::map<std::string, std::string> labels;
    bool mig = false;
};

// Fills in the board at `index`. Returns NVML_SUCCESS, or why it cannot be opened.
inline nvmlReturn_t open_board(const Library& library, unsigned index, Board& board) {
    nvmlReturn_t code = library.by_index(index, &board.device);
    std::array<char, NVML_DEVICE_UUID_V2_BUFFER_SIZE> uuid{}, name{};
    if (code == NVML_SUCCESS) code = library.uuid(board.device, uuid.data(), uuid.size());
    if (code != NVML_SUCCESS) return code;
    if (library.name) library.name(board.device, name.data(), name.size());
    board.labels = {
        {"uuid", uuid.data()}, {"model", name.data()}, {"index", std::to_string(index)}};
    unsigned mode = NVML_DEVICE_MIG_DISABLE, pending = 0;
    board.mig = library.mig && library.mig(board.device, &mode, &pending) == NVML_SUCCESS &&
                mode == NVML_DEVICE_MIG_ENABLE;
    if (board.mig) board.labels["mig"] = "on";
    return NVML_SUCCESS;
}

}  // namespace pepr::nvml
