//! The file of `--service-hosts`, which says where services are in place of DNS: lines of `HOST ADDRESS[:PORT] …`, in which what
//! comes after a `#` is a remark.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// The largest file.
const MAX_FILE: u64 = 64 << 10;

/// Each line's host, and where it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Hosts(Vec<(String, Vec<Written>)>);

/// An address, with a port unless it is the URL's.
type Written = (IpAddr, Option<u16>);

impl Hosts {
    /// Reads the file, which may take a while.
    pub fn read(path: &Path) -> Result<Hosts, String> {
        let read = || {
            // Of what is no file the end might never come.
            if !std::fs::metadata(path)?.is_file() {
                return Err(io::Error::other("it is no file"));
            }
            let mut text = String::new();
            File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
            if text.len() as u64 > MAX_FILE {
                return Err(io::Error::other(format!("it is larger than {} KiB", MAX_FILE >> 10)));
            }
            Ok(text)
        };
        let hosts = read().map_err(|error| error.to_string()).and_then(|text| Hosts::parse(&text));
        hosts.map_err(|why| format!("--service-hosts {}: {why}", path.display()))
    }

    fn parse(text: &str) -> Result<Hosts, String> {
        let mut hosts = Vec::new();
        for (n, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(host) = words.next() else { continue };
            let addresses: Vec<Written> = words
                .map(|word| address(word).ok_or_else(|| format!("line {n}: {word:.60} is no address")))
                .collect::<Result<_, _>>()?;
            if addresses.is_empty() {
                return Err(format!("line {n}: {host:.60} has no address"));
            }
            hosts.push((host.to_owned(), addresses));
        }
        Ok(Hosts(hosts))
    }

    /// Where the host is: what all of its lines say. `None`: it has no line.
    pub fn find(&self, host: &str, port: u16) -> Option<Vec<SocketAddr>> {
        let lines = self.0.iter().filter(|(named, _)| named.eq_ignore_ascii_case(host));
        let addresses = lines.flat_map(|(_, addresses)| addresses);
        let found: Vec<_> = addresses.map(|&(ip, own)| SocketAddr::new(ip, own.unwrap_or(port))).collect();
        (!found.is_empty()).then_some(found)
    }
}

fn address(word: &str) -> Option<Written> {
    let with_port = word.parse::<SocketAddr>().map(|it| (it.ip(), Some(it.port())));
    let with_port = with_port.ok().filter(|(_, port)| *port != Some(0));
    with_port.or_else(|| word.parse().ok().map(|ip| (ip, None)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_addresses_of_hosts_line_by_line() {
        let text = "# of this cluster\nauth 10.0.0.1:8080 10.0.0.2 # two\n\nother [::1]:1\nAUTH ::1\n";
        let hosts = Hosts::parse(text).expect("a good file");
        let addresses = |host: &str| {
            let found = hosts.find(host, 443)?;
            Some(found.iter().map(SocketAddr::to_string).collect::<Vec<_>>())
        };
        let of_auth = ["10.0.0.1:8080", "10.0.0.2:443", "[::1]:443"].map(str::to_owned);
        assert_eq!(addresses("auth"), Some(of_auth.to_vec()));
        assert_eq!(addresses("other"), Some(vec!["[::1]:1".to_owned()]));
        assert_eq!(addresses("nobody"), None);
    }

    #[test]
    fn a_mistake_in_a_file_is_named_by_its_line() {
        for (text, why) in [
            ("a 1.1.1.1\nb here", "line 2: here is no address"),
            ("a 1.1.1.1:0", "line 1: 1.1.1.1:0 is no address"),
            ("\na # 1.1.1.1", "line 2: a has no address"),
        ] {
            assert_eq!(Hosts::parse(text), Err(why.to_owned()), "{text}");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let refused = |path: &Path| Hosts::read(path).expect_err("no such file");
        assert!(refused(folder.path()).ends_with("it is no file"));
        let large = folder.path().join("large");
        std::fs::write(&large, "#".repeat(MAX_FILE as usize + 1)).expect("a file");
        assert_eq!(refused(&large), format!("--service-hosts {}: it is larger than 64 KiB", large.display()));
    }
}
