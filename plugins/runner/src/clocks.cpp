#include "clocks.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <fstream>
#include <vector>

namespace pq::runner {

namespace {

// A part of NVML's stable C interface (nvml.h); the library comes with the driver and is not there on a Jetson.
class Nvml {
public:
    Nvml() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
        find(initialize_, "nvmlInit_v2");
        find(handle_by_bus_id_, "nvmlDeviceGetHandleByPciBusId_v2");
        find(clock_, "nvmlDeviceGetClockInfo");
        find(max_clock_, "nvmlDeviceGetMaxClockInfo");
        ready_ = initialize_ && handle_by_bus_id_ && clock_ && max_clock_ && initialize_() == 0;
    }

    std::string clocks(const std::string& pci_bus_id) const {
        void* device = nullptr;
        if (!ready_ || handle_by_bus_id_(pci_bus_id.c_str(), &device) != 0) return "";
        std::string text;
        constexpr int kSm = 1, kMemory = 2;
        for (const auto& [name, type] : {std::pair{"SM", kSm}, std::pair{"memory", kMemory}}) {
            unsigned int now = 0, most = 0;
            if (clock_(device, type, &now) != 0) continue;
            text += std::string(text.empty() ? "" : ", ") + name + " " + std::to_string(now);
            if (max_clock_(device, type, &most) == 0) text += " of " + std::to_string(most);
            text += " MHz";
        }
        return text;
    }

private:
    template <typename Function>
    void find(Function& function, const char* name) {
        function = library_ ? reinterpret_cast<Function>(dlsym(library_, name)) : nullptr;
    }

    void* library_;
    int (*initialize_)() = nullptr;
    int (*handle_by_bus_id_)(const char*, void**) = nullptr;
    int (*clock_)(void*, int, unsigned int*) = nullptr;
    int (*max_clock_)(void*, int, unsigned int*) = nullptr;
    bool ready_ = false;
};

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

std::string mhz(const std::string& hertz) {
    return hertz.size() > 6 && hertz.find_first_not_of("0123456789") == std::string::npos
               ? hertz.substr(0, hertz.size() - 6)
               : "";
}

// "17000000.gpu" and "17000000.ga10b" on Orin, "gpu-gpc-0" on Thor.
bool is_gpu(const std::string& name) {
    for (const char* part : {"gpu", "ga10b", "gv11b", "gb10b"})
        if (name.find(part) != std::string::npos) return true;
    return false;
}

}  // namespace

std::string devfreq_clocks(const std::string& sysfs, const std::string& power_mode_file) {
    const std::string directory = sysfs + "/class/devfreq";
    std::vector<std::string> names;
    if (DIR* listing = opendir(directory.c_str())) {
        while (const dirent* entry = readdir(listing))
            if (is_gpu(entry->d_name)) names.emplace_back(entry->d_name);
        closedir(listing);
    }
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
        const std::string now = mhz(first_line(directory + "/" + name + "/cur_freq"));
        const std::string most = mhz(first_line(directory + "/" + name + "/max_freq"));
        if (now.empty()) continue;
        const std::string mode = first_line(power_mode_file);
        return "GPU " + now + (most.empty() ? "" : " of " + most) + " MHz" +
               (mode.empty() ? "" : ", power mode " + mode);
    }
    return "";
}

std::string gpu_clocks(const std::string& pci_bus_id, const std::string& sysfs, const std::string& power_mode_file) {
    static const Nvml nvml;
    for (const std::string& text : {nvml.clocks(pci_bus_id), devfreq_clocks(sysfs, power_mode_file)})
        if (!text.empty()) return text;
    return "unknown";
}

}  // namespace pq::runner
