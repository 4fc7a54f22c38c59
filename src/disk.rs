//! What the disk under a folder can do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise, statvfs};

/// Whether files in `dir` can be written beside the page cache. Some file systems (tmpfs on older kernels) refuse it.
pub fn takes_direct_io(dir: &Path) -> bool {
    let probe = dir.join(".direct-io");
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&probe);
    // A probe that stays behind does no harm.
    drop(std::fs::remove_file(&probe));
    opened.is_ok()
}

/// How many bytes can still be written under `dir`.
pub fn room(dir: &Path) -> io::Result<u64> {
    let found = statvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Makes the next read of a file come from the disk, as far as the system has it in memory and need not write it first.
pub fn drop_from_cache(path: &Path) {
    if let Ok(file) = File::open(path) {
        // It is advice: nothing depends on it.
        fadvise(&file, 0, None, Advice::DontNeed).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        takes_direct_io(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).expect("the folder is there").count(), 0);
    }
}
