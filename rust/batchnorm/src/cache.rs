//! The caches of the processor that this process runs on.

use std::path::Path;
use std::sync::OnceLock;

/// Bytes of the last-level cache, where the system does not tell.
const USUAL: usize = 32 << 20;

/// Bytes of the largest cache that the first processor sees.
pub(crate) fn last_level() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| largest(Path::new("/sys/devices/system/cpu/cpu0/cache")).unwrap_or(USUAL))
}

/// The largest `size` among the caches that Linux describes in a folder.
fn largest(folder: &Path) -> Option<usize> {
    let caches = std::fs::read_dir(folder).ok()?;
    caches.filter_map(|cache| bytes(&std::fs::read_to_string(cache.ok()?.path().join("size")).ok()?)).max()
}

/// Bytes of a size as Linux writes it: "512K", "32M".
fn bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let (number, shift) = match (text.strip_suffix('K'), text.strip_suffix('M'), text.strip_suffix('G')) {
        (Some(number), _, _) => (number, 10),
        (_, Some(number), _) => (number, 20),
        (_, _, Some(number)) => (number, 30),
        _ => (text, 0),
    };
    number.parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_linux_writes_them() {
        for (text, wanted) in
            [("32768K\n", Some(32 << 20)), ("300M", Some(300 << 20)), ("1G", Some(1 << 30)), ("512", Some(512))]
        {
            assert_eq!(bytes(text), wanted, "{text}");
        }
        for text in ["", "K", "-1K", "12T", "99999999999999999999M", "99999999999999M"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn a_cache_has_a_size() {
        assert!(last_level() > 0);
        assert_eq!(largest(Path::new("/nowhere")), None);
    }
}
