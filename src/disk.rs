//! What the disk under a folder can do.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Whether files in `dir` can be written beside the page cache. Some file systems (tmpfs on older kernels) refuse it.
pub fn takes_direct_io(dir: &Path) -> bool {
    let probe = dir.join(".direct-io");
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&probe);
    // A probe that stays behind does no harm.
    drop(std::fs::remove_file(&probe));
    opened.is_ok()
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
