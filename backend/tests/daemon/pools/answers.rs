//! The API's answers about pools and volumes, held against the OpenAPI document.

use super::{Rig, disk};
use crate::api::ask;
use serde_json::json;

#[test]
fn every_answer_is_as_the_document_says() {
    let rig = Rig::new(6, 128, &disk("v", "p0/v", ""));
    let daemon = rig.place.serve();
    let call = |method: &str, path: &str, template: &str, body: serde_json::Value, code| {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        ask(&daemon, method, path, template, &body, code)
    };
    let none = serde_json::Value::Null;
    let (pools, pool) = ("/v1/pools", "/v1/pools/{pool}");
    let create = json!({"name": "p0", "level": "raid1", "devices": ["d0", "d1"]});
    for (body, code) in [
        (json!({"name": "p0", "level": "raid1"}), 400),
        (json!({"name": "p 0", "level": "raid1", "devices": ["d0", "d1"]}), 400),
        (json!({"name": "p0", "level": "best", "devices": ["d0", "d1"]}), 400),
        (json!({"name": "p0", "level": "raid1", "devices": ["d0", "none"]}), 400),
        (json!({"name": "p0", "level": "raid1", "devices": ["d0"]}), 400),
        (create.clone(), 201),
        (create, 409),
    ] {
        call("POST", pools, pools, body, code);
    }
    call("GET", pools, pools, none.clone(), 200);
    assert_eq!(call("GET", "/v1/pools/p0", pool, none.clone(), 200)["state"], "ready");
    call("GET", "/v1/pools/none", pool, none.clone(), 404);
    let (volumes, volume) = ("/v1/pools/{pool}/volumes", "/v1/pools/{pool}/volumes/{volume}");
    for (name, size, code) in [("v", 1 << 30, 201), ("v", 1 << 30, 409), ("a b", 1 << 30, 400), ("w", 0, 400)]
    {
        call("POST", "/v1/pools/p0/volumes", volumes, json!({"name": name, "size_bytes": size}), code);
    }
    call("POST", "/v1/pools/none/volumes", volumes, json!({"name": "v", "size_bytes": 1 << 30}), 404);
    call("GET", "/v1/pools/p0/volumes", volumes, none.clone(), 200);
    call("GET", "/v1/pools/none/volumes", volumes, none.clone(), 404);
    call("GET", "/v1/volumes", "/v1/volumes", none.clone(), 200);
    let one = "/v1/pools/p0/volumes/v";
    call("GET", one, volume, none.clone(), 200);
    call("GET", "/v1/pools/p0/volumes/none", volume, none.clone(), 404);
    let set = call("PATCH", one, volume, json!({"size_bytes": 2u64 << 30}), 200);
    assert_eq!(set["size_bytes"], 2u64 << 30);
    call("PATCH", one, volume, json!({"size": 1}), 400);
    call("PATCH", "/v1/pools/p0/volumes/none", volume, json!({"size_bytes": 1 << 30}), 404);
    let (snapshots, clones) = ("/v1/pools/{pool}/snapshots", "/v1/pools/{pool}/clones");
    for (wanted, code) in [
        (json!([]), 400),
        (json!([{"volume": "v", "name": "s"}]), 201),
        (json!([{"volume": "v", "name": "s"}]), 409),
        (json!([{"volume": "none", "name": "t"}]), 404),
    ] {
        call("POST", "/v1/pools/p0/snapshots", snapshots, json!({"snapshots": wanted}), code);
    }
    for (snapshot, name, code) in [("s", "c", 201), ("s", "c", 409), ("none", "d", 404), ("v", "d", 400)] {
        call("POST", "/v1/pools/p0/clones", clones, json!({"snapshot": snapshot, "name": name}), code);
    }
    let data = "/v1/pools/{pool}/volumes/{volume}/data";
    for query in ["?offset=0", "?offset=1&length=4096", "?offset=0&length=99999999"] {
        call("GET", &format!("/v1/pools/p0/volumes/s/data{query}"), data, none.clone(), 400);
    }
    let (code, _, body) = daemon.http("GET", "/v1/pools/p0/volumes/s/data?offset=0&length=8388608", "");
    assert_eq!((code, body.as_str()), (204, ""));
    call("DELETE", "/v1/pools/p0/volumes/c", volume, none.clone(), 200);
    call("DELETE", "/v1/pools/p0/volumes/c", volume, none.clone(), 404);
    call("DELETE", one, volume, none.clone(), 409);
    for (action, body, code) in [
        ("scrub", json!({"repair": true}), 200),
        ("scrub", json!({"repair": 1}), 400),
        ("spares", json!({"devices": ["d2"]}), 200),
        ("spares", json!({"devices": ["d0"]}), 409),
        ("spares", json!({"devices": ["none"]}), 400),
        ("grow", json!({"devices": ["d3"]}), 400),
        ("grow", json!({"devices": ["d3", "d4"]}), 200),
        ("replace", json!({"old": "none", "new": "d5"}), 404),
        ("replace", json!({"old": "d1", "new": "d5"}), 200),
    ] {
        let template = format!("/v1/pools/{{pool}}/{action}");
        call("POST", &format!("/v1/pools/p0/{action}"), &template, body, code);
    }
    // It may have ended by itself.
    let (code, _, body) = daemon.http("DELETE", "/v1/pools/p0/replace", "");
    assert!(code == 200 || body.contains("is replacing no member"), "{code}: {body}");
    call("DELETE", "/v1/pools/p0/replace", "/v1/pools/{pool}/replace", none.clone(), 409);
    let status = call("GET", "/v1/status", "/v1/status", none.clone(), 200);
    assert_eq!((&status["pools"][0]["name"], &status["volumes"][0]["pool"]), (&"p0".into(), &"p0".into()));
    call("GET", "/v1/disks/v", "/v1/disks/{name}", none.clone(), 200);
    call("GET", "/v1/devices/d0", "/v1/devices/{name}", none, 200);
    for (method, path, code) in [
        ("DELETE", "/v1/pools", 405),
        ("PUT", "/v1/pools/p0", 405),
        ("GET", "/v1/pools/p0/scrub", 405),
        ("POST", "/v1/volumes", 405),
        ("GET", "/v1/pools/p0/x", 404),
    ] {
        assert_eq!(daemon.http(method, path, "").0, code, "{method} {path}");
    }
    assert_eq!(daemon.end(), Some(0));
}
