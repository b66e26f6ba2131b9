//! What an ordinary user may not do is one line that names it, whoever runs the tests.

use crate::common::Place;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Root may do everything, so that no test had seen a permission that is missing.
#[test]
fn a_missing_permission_is_one_line_that_names_what_it_is_about() {
    let place = Place::new();
    mode(place.path("x").parent().unwrap(), 0o755);
    for (folder, bits) in [("closed", 0o555), ("open", 0o777)] {
        fs::create_dir(place.path(folder)).unwrap();
        mode(&place.path(folder), bits);
    }
    for (name, bits) in [("secret", 0o000), ("image", 0o666)] {
        fs::write(place.path(name), [0; 4096]).unwrap();
        mode(&place.path(name), bits);
    }
    let configure = |api: &str, state_dir: &str, uri: &str| {
        let text = format!(
            "[daemon]\napi = \"@/{api}\"\nstate_dir = \"@/{state_dir}\"\n[[device]]\nname = \"d\"\nuri = \"{uri}\"\n"
        );
        fs::write(place.path("hawser.toml"), text.replace("@/", &place.text(""))).unwrap();
    };
    let file = place.text("hawser.toml");
    let at = |name: &str| place.text("").trim_end_matches('/').to_owned() + "/" + name;
    let far = "nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:t";
    let (serve, image) = (["serve", "--config", &file], place.text("image"));
    let import = ["image", "import", &image, "d", "--config", &file];

    configure("open/api", "open/lib", "file://@/secret");
    let device = format!("{file}:6:7: [[device]] uri: {}: cannot be opened: Permission denied", at("secret"));
    for args in [&serve[..], &import[..]] {
        let line = place.fails_as_nobody(args, 1);
        assert!(line.starts_with(&device), "{line}");
    }
    let line = place.fails_as_nobody(&["image", "import", &at("secret"), "d", "--config", &file], 1);
    assert!(line.starts_with(&format!("{}: cannot be opened: Permission denied", at("secret"))), "{line}");

    if ["hostid", "hostnqn"].iter().all(|name| Path::new("/etc/nvme").join(name).exists()) {
        skips::skip("/etc/nvme has an identity, so that none is kept in state_dir");
    } else {
        configure("open/api", "closed/lib", far);
        for args in [&serve[..], &import[..]] {
            let line = place.fails_as_nobody(args, 1);
            assert!(line.contains("closed/lib") && line.contains("Permission denied"), "{line}");
        }
    }

    configure("closed/api", "open/lib", "null:?size=1MiB");
    let line = place.fails_as_nobody(&serve, 1);
    assert!(line.starts_with(&at("closed/api.state: cannot be made: Permission denied")), "{line}");

    mode(&place.path("hawser.toml"), 0o000);
    let line = place.fails_as_nobody(&serve, 2);
    assert!(line.starts_with(&format!("{file}: cannot be read: Permission denied")), "{line}");

    assert_eq!(fs::read_dir(place.path("closed")).unwrap().count(), 0);
}
