// The GPU's clocks while it works: a figure without them says little on a Jetson.
#pragma once

#include <string>

namespace pq::runner {

// From NVML, which desktop and server GPUs have, for the GPU with this PCI bus id ("0000:01:00.0"); else from the
// kernel's devfreq, which Jetsons have, under `sysfs`; else "unknown". "GPU 1300 of 1300 MHz, power mode pmode:0000".
std::string gpu_clocks(const std::string& pci_bus_id, const std::string& sysfs = "/sys",
                       const std::string& power_mode_file = "/var/lib/nvpmodel/status");
// The second way alone; empty where there is no GPU in devfreq.
std::string devfreq_clocks(const std::string& sysfs, const std::string& power_mode_file);

}  // namespace pq::runner
