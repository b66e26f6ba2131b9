//! The management API, held against the OpenAPI document that it serves.

use crate::common::{Place, Serving};
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::net::UnixStream;

const CONFIG: &str = r#"
[[device]]
name = "m0"
uri = "mem:?size=16MiB"
[[device]]
name = "r0"
uri = "nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:none"
[[disk]]
name = "near"
device = "m0"
shared = true
socket = "@/near.sock"
[[disk]]
name = "far"
device = "r0"
socket = "@/far.sock"
[[subsystem]]
nqn = "nqn.2026-11.io.hawser:t"
listen = ["tcp://127.0.0.1:0"]
allowed_hosts = ["nqn.2026-11.io.hawser:h"]
[[subsystem.namespace]]
nsid = 1
device = "m0"
"#;

fn document() -> Value {
    serde_json::from_str(hawser::daemon::api::OPENAPI).unwrap()
}

/// Checks `value` against `schema`. Knows what the document uses of JSON Schema; anything else in it is an error, so that
/// nothing passes for not being looked at.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let schema_object = schema.as_object().ok_or(format!("{at}: the schema is no object"))?;
    for key in schema_object.keys() {
        let known = [
            "$ref",
            "type",
            "properties",
            "required",
            "additionalProperties",
            "items",
            "enum",
            "minimum",
            "maximum",
            "description",
        ];
        if !known.contains(&key.as_str()) {
            return Err(format!("{at}: the checker does not know {key}"));
        }
    }
    if let Some(reference) = schema["$ref"].as_str() {
        let pointer = reference.strip_prefix('#').ok_or(format!("{at}: {reference}"))?;
        let target = document.pointer(pointer).ok_or(format!("{at}: {reference} leads nowhere"))?;
        return check(document, target, value, at);
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => return Err(format!("{at}: the schema says no type")),
    };
    if !kinds.contains(&kind) {
        return Err(format!("{at}: {kind}, want {kinds:?}"));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        return Err(format!("{at}: {value}, want one of {allowed:?}"));
    }
    for (limit, ok) in [("minimum", i64::ge as fn(&i64, &i64) -> bool), ("maximum", i64::le)] {
        if let (Some(limit), Some(number)) = (schema[limit].as_i64(), value.as_i64())
            && !ok(&number, &limit)
        {
            return Err(format!("{at}: {number} is beyond {limit}"));
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check(document, &schema["items"], item, &format!("{at}[{index}]"))?;
    }
    let Some(object) = value.as_object() else { return Ok(()) };
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !object.contains_key(required) {
            return Err(format!("{at}: {required} is missing"));
        }
    }
    for (name, member) in object {
        match schema["properties"].get(name) {
            Some(schema) => check(document, schema, member, &format!("{at}.{name}"))?,
            None if schema["additionalProperties"] == json!(false) => {
                return Err(format!("{at}: {name} is not in the schema"));
            }
            None => {}
        }
    }
    Ok(())
}

/// Asks, and holds the answer against what the document says of `template` and the code that came.
pub(crate) fn ask(
    daemon: &Serving,
    method: &str,
    path: &str,
    template: &str,
    body: &str,
    want: u16,
) -> Value {
    let (code, content_type, answer) = daemon.http(method, path, body);
    assert_eq!(code, want, "{method} {path}: {answer}");
    let document = document();
    let operation = &document["paths"][template][method.to_lowercase()];
    let content = &operation["responses"][code.to_string()]["content"][&content_type];
    assert!(content.is_object(), "{method} {path} {code} {content_type} is not in the document");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    check(&document, &content["schema"], &answer, path).unwrap();
    answer
}

fn disk(place: &Place, name: &str) -> Value {
    json!({"name": name, "device": "m0", "socket": place.text(&format!("{name}.sock")), "shared": true})
}

#[test]
fn every_answer_is_as_the_document_says() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    for path in ["/v1/status", "/v1/disks", "/v1/devices", "/v1/subsystems", "/v1/openapi.json"] {
        ask(&daemon, "GET", path, path, "", 200);
    }
    let status = ask(&daemon, "GET", "/v1/status", "/v1/status", "", 200);
    let states: Vec<&Value> = status["disks"].as_array().unwrap().iter().map(|disk| &disk["state"]).collect();
    assert_eq!(states, ["listening", "waiting"]);
    let one = "/v1/disks/{name}";
    ask(&daemon, "GET", "/v1/disks/near", one, "", 200);
    ask(&daemon, "GET", "/v1/disks/none", one, "", 404);
    let add = |value: &Value| json!({"disk": value, "save": false}).to_string();
    let new = disk(&place, "new");
    let (all, resume) = ("/v1/disks", "/v1/disks/{name}/resume");
    ask(&daemon, "POST", all, all, &add(&new), 201);
    ask(&daemon, "POST", all, all, &add(&new), 409);
    let mut wrong = disk(&place, "wrong");
    wrong["frobnicate"] = json!(1);
    let error = ask(&daemon, "POST", all, all, &add(&wrong), 400);
    assert!(error["error"].as_str().unwrap().starts_with("unknown field `frobnicate`"), "{error}");
    let mut wrong = disk(&place, "wrong");
    wrong["serial"] = json!("a-serial-of-21-bytes-");
    ask(&daemon, "POST", all, all, &add(&wrong), 400);
    ask(&daemon, "POST", all, all, "{", 400);
    ask(&daemon, "POST", all, all, &" ".repeat(100_000), 400);
    let mut nowhere = disk(&place, "nowhere");
    nowhere["socket"] = json!(place.text("no/such/folder"));
    ask(&daemon, "POST", all, all, &add(&nowhere), 500);
    ask(&daemon, "POST", "/v1/disks/new/resume", resume, "", 409);
    ask(&daemon, "POST", "/v1/disks/none/resume", resume, "", 404);
    ask(&daemon, "DELETE", "/v1/disks/new?save=perhaps", one, "", 400);
    ask(&daemon, "DELETE", "/v1/disks/new?save=true", one, "", 409);
    ask(&daemon, "DELETE", "/v1/disks/new", one, "", 200);
    ask(&daemon, "DELETE", "/v1/disks/new", one, "", 404);
    let reservation = "/v1/devices/{name}/reservation";
    ask(&daemon, "GET", "/v1/devices/m0/reservation", reservation, "", 400);
    ask(&daemon, "GET", "/v1/devices/none/reservation", reservation, "", 404);
    ask(
        &daemon,
        "POST",
        "/v1/devices/m0/reservation",
        reservation,
        r#"{"action": "clear", "crkey": "1"}"#,
        400,
    );
    ask(&daemon, "POST", "/v1/devices/m0/reservation", reservation, r#"{"action": "acquire"}"#, 400);
    let device = "/v1/devices/{name}";
    let policy = json!({"io_policy": "round-robin"}).to_string();
    let set = ask(&daemon, "PATCH", "/v1/devices/r0", device, &policy, 200);
    assert_eq!(set["settings"]["io_policy"], "round-robin");
    let seen = ask(&daemon, "GET", "/v1/devices/r0", device, "", 200);
    assert_eq!(seen["settings"], json!({"io_policy": "round-robin", "on_cache_doubt": "trust"}));
    assert_eq!(seen["paths"][0]["losses"]["closed"], 0);
    ask(&daemon, "PATCH", "/v1/devices/m0", device, &policy, 400);
    ask(&daemon, "PATCH", "/v1/devices/r0", device, "{\"io_policy\": \"best\"}", 400);
    ask(&daemon, "PATCH", "/v1/devices/none", device, &policy, 404);
    ask(&daemon, "GET", "/v1/devices/none", device, "", 404);
    let discovery = "/v1/discovery";
    let referrals = json!({"referrals": ["tcp://192.0.2.1:8009"]});
    assert_eq!(ask(&daemon, "PUT", discovery, discovery, &referrals.to_string(), 200), referrals);
    assert_eq!(ask(&daemon, "GET", discovery, discovery, "", 200), referrals);
    let nowhere = json!({"referrals": ["192.0.2.1"]}).to_string();
    ask(&daemon, "PUT", discovery, discovery, &nowhere, 400);
    let ana = "/v1/subsystems/{nqn}/ports/{port}/ana_groups/{grpid}";
    let set = |nqn: &str, port: u32, group: u32, state: &str, code| {
        let path = format!("/v1/subsystems/nqn.2026-11.io.hawser:{nqn}/ports/{port}/ana_groups/{group}");
        ask(&daemon, "PUT", &path, ana, &json!({ "ana_state": state }).to_string(), code)
    };
    let subsystem = set("t", 0, 1, "non-optimized", 200);
    assert_eq!(subsystem["ports"][0]["ana_groups"][0], json!({"grpid": 1, "ana_state": "non-optimized"}));
    for (nqn, port, group, state, code) in [
        ("t", 0, 1, "good", 400),
        ("t", 1, 1, "change", 404),
        ("t", 0, 2, "change", 404),
        ("none", 0, 1, "change", 404),
    ] {
        set(nqn, port, group, state, code);
    }
    let hosts = "/v1/subsystems/{nqn}/hosts/{host}";
    for (method, nqn, host, code) in [
        ("PUT", "t", "nqn.host", 200),
        ("PUT", "t", "nqn.host", 409),
        ("PUT", "none", "nqn.host", 404),
        ("PUT", "t", "host", 400),
        ("DELETE", "t", "nqn.host", 200),
        ("DELETE", "t", "nqn.host", 404),
        ("DELETE", "none", "nqn.host", 404),
    ] {
        let path = format!("/v1/subsystems/nqn.2026-11.io.hawser:{nqn}/hosts/{host}");
        ask(&daemon, method, &path, hosts, "", code);
    }
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn what_is_not_there_is_an_error_in_json() {
    let place = Place::new();
    place.configure("");
    let daemon = place.serve();
    for (method, path, code) in [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v2/status", 404),
        ("GET", "/v1/disks/a/b/c", 404),
        ("PUT", "/v1/disks", 405),
        ("POST", "/v1/status", 405),
        ("DELETE", "/metrics", 405),
    ] {
        let (found, content_type, body) = daemon.http(method, path, "");
        assert_eq!((found, content_type.as_str()), (code, "application/json"), "{method} {path}");
        assert!(serde_json::from_str::<Value>(&body).unwrap()["error"].is_string());
    }
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let document = document();
    let schema = json!({"$ref": "#/components/schemas/Reactor"});
    let good = json!({"cpu": null, "passes": 1, "busy_passes": 1, "sleeps": 0});
    check(&document, &schema, &good, "").unwrap();
    for (key, value) in
        [("cpu", json!("0")), ("passes", json!(-1)), ("extra", json!(1)), ("sleeps", json!(0.5))]
    {
        let mut bad = good.clone();
        bad[key] = value;
        check(&document, &schema, &bad, "").unwrap_err();
    }
    check(&document, &schema, &json!({"cpu": 1}), "").unwrap_err();
    check(&document, &json!({"type": "string", "pattern": "a"}), &json!("a"), "").unwrap_err();
}

#[test]
fn metrics_are_open_metrics() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let (code, content_type, text) = daemon.http("GET", "/metrics", "");
    assert_eq!(
        (code, content_type.as_str()),
        (200, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    assert!(text.ends_with("# EOF\n"));
    for want in [
        "hawser_disk_requests_total{disk=\"near\",kind=\"read\"} 0",
        "hawser_device_bytes_total{device=\"m0\",kind=\"write\"} 0",
        "hawser_disk_failures_total{disk=\"near\",status=\"media\"} 0",
        "hawser_path_latency_seconds_bucket{le=\"+Inf\",device=\"r0\",path=\"nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:none?nsid=1\",kind=\"read\"} 0",
        "hawser_path_losses_total{device=\"r0\",path=\"nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:none?nsid=1\",cause=\"keep_alive\"} 0",
        "hawser_path_state{device=\"r0\",path=\"nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:none?nsid=1\",state=\"connecting\"} 1",
        "hawser_device_copied_bytes_total{device=\"m0\",reason=\"mem\"} 0",
        "hawser_device_setting{device=\"r0\",key=\"on_cache_doubt\",value=\"trust\"} 1",
        "hawser_disk_latency_seconds_count{disk=\"near\",kind=\"flush\"} 0",
        "hawser_disk_latency_seconds_bucket{le=\"+Inf\",disk=\"near\",kind=\"read\"} 0",
        "hawser_disk_state{disk=\"far\",state=\"waiting\"} 1",
        "hawser_reactor_passes_total{reactor=\"0\"}",
        "hawser_crashes_total 0",
    ] {
        assert!(text.contains(want), "{want} is not in\n{text}");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn a_client_that_says_nothing_stalls_nobody() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let mut silent: Vec<UnixStream> =
        (0..20).map(|_| UnixStream::connect(place.path("api")).unwrap()).collect();
    for stream in &mut silent {
        stream.write_all(b"GET /v1/sta").unwrap();
    }
    let mut garbage = UnixStream::connect(place.path("api")).unwrap();
    garbage.write_all(&[0xff; 4096]).unwrap();
    assert_eq!(daemon.status()["pid"], daemon.pid());
    assert_eq!(daemon.end(), Some(0));
}
