// Finds NVIDIA's driver library, and what is the same for all who use it.

#include "sensors/nvml_library.h"

#include <array>
#include <filesystem>

namespace pepr::nvml {

namespace {

constexpr const char* kUsualLibrary = "libnvidia-ml.so.1";

// Where drivers put it although the loader may not look there: device plugins of containers, WSL2,
// NixOS, Red Hat, Debian.
constexpr const char* kFolders[] = {
    "usr/local/nvidia/lib64",
    "usr/local/nvidia/lib",
    "usr/lib/wsl/lib",
    "run/opengl-driver/lib",
    "usr/lib64",
    "usr/lib64/nvidia",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu/nvidia/current",
};

}  // namespace

std::string remedy(nvmlReturn_t code) {
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

LoadedLibrary load_library(const std::string& where) {
    namespace fs = std::filesystem;
    std::error_code error;
    std::vector<fs::path> places{where.empty() ? fs::path(kUsualLibrary) : fs::path(where)};
    if (where.empty() || fs::is_directory(where, error)) {
        const fs::path root = where.empty() ? "/" : where;
        if (!where.empty()) places[0] = root / kUsualLibrary;
        for (const char* folder : kFolders)
            if (fs::exists(root / folder / kUsualLibrary, error))
                places.push_back(root / folder / kUsualLibrary);
    }
    std::string reason;  // of the last one: what is there and cannot be loaded says more
    for (const fs::path& place : places) {
        void* const handle = ::dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle != nullptr) return {handle, place.string()};
        const char* const why = ::dlerror();
        reason = why != nullptr ? why : place.string();
    }
    throw SensorError("no NVIDIA driver library", reason,
                      "install the NVIDIA driver; in a container, start it with GPU access "
                      "(docker run --gpus all); if its library is elsewhere: --sensor "
                      "nvml:PATH");
}

SensorError nothing_found(const std::vector<Note>& notes) {
    if (!notes.empty()) return SensorError(notes[0]);
    return {"no NVIDIA GPU", "the driver runs but sees no device",
            "check nvidia-smi -L, and NVIDIA_VISIBLE_DEVICES in a container"};
}

nvmlReturn_t open_board(const Library& library, unsigned index, Board& board) {
    nvmlReturn_t code = library.by_index(index, &board.device);
    std::array<char, NVML_DEVICE_UUID_V2_BUFFER_SIZE> uuid{}, name{};
    if (code == NVML_SUCCESS) code = library.uuid(board.device, uuid.data(), uuid.size());
    if (code != NVML_SUCCESS) return code;
    if (library.name) library.name(board.device, name.data(), name.size());
    board.labels = {
        {"uuid", uuid.data()}, {"model", name.data()}, {"index", std::to_string(index)}};
    if (!library.driver.empty()) board.labels["driver"] = library.driver;
    unsigned mode = NVML_DEVICE_MIG_DISABLE, pending = 0;
    board.mig = library.mig && library.mig(board.device, &mode, &pending) == NVML_SUCCESS &&
                mode == NVML_DEVICE_MIG_ENABLE;
    if (board.mig) board.labels["mig"] = "on";
    return NVML_SUCCESS;
}

}  // namespace pepr::nvml
