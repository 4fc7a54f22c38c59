//! Disks that fail: a library between a server and the system (`faults.c`), which fails calls while a file says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;

use super::{LogKind, Server};

/// The library, compiled once.
static LIBRARY: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("faults.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/faults.c");
    let compiled =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    (folder, library)
});

/// What fails, of one server.
pub struct Faults {
    folder: TempDir,
}

impl Faults {
    /// A server on the embedded log whose disk fails when it is told to.
    pub fn server(more: &[&str]) -> (Server, Faults) {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::stopped_with(LogKind::embedded(), more);
        server.set_variable("LD_PRELOAD", &LIBRARY.1);
        server.set_variable("FAULTS", folder.path());
        let data = server.data().to_owned();
        server.set_variable("FAULTS_UNDER", &data);
        server.up();
        (server, Faults { folder })
    }

    /// From now on calls of this sort fail: `sync`, `write` or `full`.
    pub fn begin(&self, what: &str) {
        std::fs::write(self.folder.path().join(what), "").unwrap();
    }

    pub fn end(&self, what: &str) {
        std::fs::remove_file(self.folder.path().join(what)).unwrap();
    }
}
