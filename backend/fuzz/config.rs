//! The configuration from any text: accepted, or refused with one line.
#![no_main]

use hawser_config::Config;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A zero byte cuts the text into the main file and one of conf.d.
    let (main, other) = text.split_once('\0').unwrap_or((text, ""));
    let files = [("hawser.toml".into(), main.to_owned()), ("conf.d/disk-x.toml".into(), other.to_owned())];
    if let Err(error) = Config::parse(&files) {
        let line = error.to_string();
        assert!(!line.is_empty() && !line.contains('\n'), "not one line: {line:?}");
    }
});
