//! How much memory there is for this process: that of the machine, or less where a cgroup says so.

use std::path::{Path, PathBuf};

/// Bytes that the process may use; `None` if the system does not say.
pub fn available() -> Option<u64> {
    available_under(Path::new("/"))
}

fn available_under(root: &Path) -> Option<u64> {
    let machine = std::fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| total(&text));
    let cgroup = cgroup_files(root).iter().filter_map(|file| limit(file)).min();
    machine.into_iter().chain(cgroup).min()
}

/// `MemTotal` of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// The files that may hold a limit: those of the process's own group and of all groups around it. In a container the
/// path that the kernel names may be the host's, so that only the outermost file is there.
fn cgroup_files(root: &Path) -> Vec<PathBuf> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|it| it == "memory") => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        let own = Path::new(path.trim_start_matches('/'));
        files.extend(own.ancestors().map(|group| root.join(mount).join(group).join(file)));
    }
    files
}

/// The limit in a file; `None` without one. Version 1 writes "no limit" as a number beyond any machine's memory.
fn limit(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder is made");
            std::fs::write(path, text).expect("the file is written");
        }
        available_under(root.path())
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:        8000 kB\nMemFree:         5 kB\n");

    #[test]
    fn without_a_limit_it_is_the_memory_of_the_machine() {
        assert_eq!(machine(&[MEMINFO]), Some(8_000 << 10));
        let unlimited = [
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/a\n0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(machine(&unlimited), Some(8_000 << 10));
        assert_eq!(machine(&[]), None);
    }

    #[test]
    fn the_smallest_limit_of_all_groups_around_the_process_holds() {
        let second = [
            MEMINFO,
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/inner/memory.max", "3000000\n"),
            ("sys/fs/cgroup/outer/memory.max", "2000000\n"),
        ];
        assert_eq!(machine(&second), Some(2_000_000));
        let first = [
            MEMINFO,
            ("proc/self/cgroup", "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "1000000\n"),
        ];
        assert_eq!(machine(&first), Some(1_000_000));
    }

    #[test]
    fn in_a_container_that_shows_the_paths_of_its_host_the_limit_is_found_at_the_mount() {
        let files = [MEMINFO, ("proc/self/cgroup", "0::/kubepods/pod7\n"), ("sys/fs/cgroup/memory.max", "4000000\n")];
        assert_eq!(machine(&files), Some(4_000_000));
    }
}
