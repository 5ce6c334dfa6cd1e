//! Which NUMA node is near: of CPUs, of PCI devices. Reads sysfs; binds memory by the plain system call, so
//! that libnuma is not needed.

use std::fs;
use std::path::Path;

/// Nodes above this cannot be named in a mask.
const NODES_MAX: u32 = 1024;
/// From `linux/mempolicy.h`: prefer the node, take another where it is full.
const MPOL_PREFERRED: libc::c_int = 1;

/// The node of a CPU, where the system has nodes.
pub fn node_of_cpu(cpu: usize) -> Option<u32> {
    node_of_cpu_below(Path::new("/sys"), cpu)
}

/// The node that all of these CPUs belong to; `None` where they are spread, or none are given.
pub fn node_of_cpus(cpus: &[usize]) -> Option<u32> {
    let mut nodes = cpus.iter().map(|cpu| node_of_cpu(*cpu));
    let first = nodes.next()??;
    nodes.all(|node| node == Some(first)).then_some(first)
}

/// The node of a PCI device by its bus address, such as `0000:65:00.0`; `None` where the firmware does not
/// say.
pub fn node_of_pci(address: &str) -> Option<u32> {
    node_of_pci_below(Path::new("/sys"), address)
}

/// How many nodes have memory; 1 where the system does not say.
pub fn node_count() -> usize {
    let Ok(entries) = fs::read_dir("/sys/devices/system/node") else { return 1 };
    let nodes = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(node_number))
        .count();
    nodes.max(1)
}

fn node_of_cpu_below(sys: &Path, cpu: usize) -> Option<u32> {
    let directory = sys.join(format!("devices/system/cpu/cpu{cpu}"));
    fs::read_dir(directory)
        .ok()?
        .flatten()
        .find_map(|entry| entry.file_name().to_str().and_then(node_number))
}

fn node_number(name: &str) -> Option<u32> {
    name.strip_prefix("node")?.parse().ok()
}

fn node_of_pci_below(sys: &Path, address: &str) -> Option<u32> {
    let plain = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
    if address.is_empty() || !address.chars().all(plain) {
        return None;
    }
    // Drivers write the address in capitals and with eight digits of domain; sysfs does neither.
    let lower = address.to_ascii_lowercase();
    let (domain, rest) = lower.split_once(':')?;
    let name = format!("{:04x}:{rest}", u32::from_str_radix(domain, 16).ok()?);
    let text = fs::read_to_string(sys.join("bus/pci/devices").join(name).join("numa_node")).ok()?;
    // -1: the firmware does not say.
    text.trim().parse().ok()
}

/// Asks for pages of this range on `node`, others where it is full. To be called before they are touched.
///
/// # Errors
/// The errno, where the kernel has no such node or no NUMA at all.
pub(super) fn prefer_node(base: *mut u8, length: usize, node: u32) -> Result<(), i32> {
    if node >= NODES_MAX {
        return Err(libc::EINVAL);
    }
    const BITS: usize = libc::c_ulong::BITS as usize;
    let mut mask = [0 as libc::c_ulong; NODES_MAX as usize / BITS];
    mask[node as usize / BITS] |= 1 << (node as usize % BITS);
    // SAFETY: mbind reads `mask`, which outlives the call and has the bits that are announced, and changes
    // the policy of the range, not its bytes.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            base,
            length,
            MPOL_PREFERRED,
            mask.as_ptr(),
            NODES_MAX as libc::c_ulong,
            0,
        )
    };
    match status {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_read_from_sysfs() {
        // Goal: a CPU's and a device's node are found, also by the address as the CUDA driver writes it.
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join("devices/system/cpu/cpu9/node1")).unwrap();
        fs::create_dir_all(sys.path().join("devices/system/cpu/cpu9/topology")).unwrap();
        let device = sys.path().join("bus/pci/devices/0000:65:00.0");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("numa_node"), "1\n").unwrap();
        assert_eq!(node_of_cpu_below(sys.path(), 9), Some(1));
        assert_eq!(node_of_cpu_below(sys.path(), 10), None);
        assert_eq!(node_of_pci_below(sys.path(), "0000:65:00.0"), Some(1));
        assert_eq!(node_of_pci_below(sys.path(), "00000000:65:00.0"), Some(1));
        fs::write(device.join("numa_node"), "-1\n").unwrap();
        assert_eq!(node_of_pci_below(sys.path(), "0000:65:00.0"), None);
        assert_eq!(node_of_pci_below(sys.path(), "../../etc"), None);
    }
}
