//! Custom kinds with a schema: `PUT /v1/kinds/{kind}`, and what becomes of data that breaks it.

use serde_json::{Value, json};
use weft::protocol::custom::{MAX_KINDS, MAX_SCHEMA};

use super::groups::as_admin;
use super::run;
use crate::on_both_logs;
use crate::support::{
    LogKind, Server, Socket, accepted, eventually, has, publish, refused, refused_with, token, token_of,
};

/// What an order must be.
fn order() -> Value {
    json!({
        "type": "object",
        "required": ["id"],
        "properties": {
            "id": {"type": "string"},
            "items": {"type": "array", "items": {"properties": {"price": {"type": "number"}}}}
        }
    })
}

/// Sets a kind's schema, as the tenant's admin.
async fn set(server: &Server, kind: &str, schema: Value) -> (u16, Value) {
    as_admin(server, "PUT", &format!("/v1/kinds/{kind}"), Some(schema)).await
}

/// Publishes over HTTP.
async fn send(server: &Server, kind: &str, data: Value) -> (u16, Value) {
    server.http("POST", "/v1/threads/t/events", "ada", Some(json!({"kind": kind, "data": data}))).await
}

/// Sends a body as it is.
async fn put_text(server: &Server, kind: &str, body: String) -> (u16, Value) {
    let url = format!("{}/v1/kinds/{kind}", server.url);
    let request = reqwest::Client::new().put(url).bearer_auth(token("root", "admin")).body(body);
    let reply = request.send().await.unwrap();
    (reply.status().as_u16(), serde_json::from_str(&reply.text().await.unwrap()).unwrap())
}

on_both_logs!(a_kind_s_schema_is_set_shown_listed_replaced_and_deleted, |log| async move {
    let server = Server::start(log);
    let (status, made) = set(&server, "x.order", order()).await;
    assert_eq!(status, 201, "{made}");
    has(&made, json!({"kind": "x.order", "set_by": "root", "bytes": order().to_string().len()}));
    let (status, same) = set(&server, "x.order", order()).await;
    assert_eq!((status, &same), (200, &made), "the same again changes nothing");

    // Whoever is of the tenant may look.
    let (status, shown) = server.http("GET", "/v1/kinds/x.order", "ada", None).await;
    assert_eq!(status, 200, "{shown}");
    has(&shown, json!({"kind": "x.order", "set_by": "root", "set_at": made["set_at"], "schema": order()}));

    set(&server, "x.a%2Fb", json!({})).await;
    let (_, page) = server.http("GET", "/v1/kinds?limit=1", "ada", None).await;
    has(&page["kinds"][0], json!({"kind": "x.a/b", "bytes": 2, "schema": null}));
    let next = format!("/v1/kinds?limit=1&cursor={}", page["next"].as_str().unwrap());
    let (_, page) = server.http("GET", &next, "ada", None).await;
    has(&page["kinds"][0], json!({"kind": "x.order"}));
    assert!(page["next"].is_null() && page["kinds"].as_array().unwrap().len() == 1, "{page}");

    let (status, replaced) = set(&server, "x.order", json!({"type": "string"})).await;
    assert_eq!(status, 200, "{replaced}");
    has(&replaced, json!({"bytes": 17}));
    let (status, deleted) = as_admin(&server, "DELETE", "/v1/kinds/x.order", None).await;
    assert_eq!((status, &deleted), (200, &json!({"kind": "x.order", "deleted": true})));
    for method in ["GET", "DELETE"] {
        refused(&as_admin(&server, method, "/v1/kinds/x.order", None).await.1, "not_found", "kind");
    }
});

on_both_logs!(data_that_breaks_its_kind_s_schema_is_refused_by_its_place_however_it_comes, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    // From before there is a schema.
    accepted(&ada.ask(publish("t", "x.order", json!(7))).await);
    set(&server, "x.order", order()).await;

    let bad = json!({"id": "a", "items": [{"price": 1}, {"price": "1"}]});
    let place = "data/items/1/price";
    let said = "data/items/1/price must be a number, not a string";
    let refusal = ada.ask(publish("t", "x.order", bad.clone())).await;
    refused(&refusal, "bad_request", place);
    assert_eq!(refusal["message"], said, "{refusal}");
    let (status, problem) = send(&server, "x.order", bad.clone()).await;
    refused(&problem, "bad_request", place);
    assert_eq!((status, &problem["detail"]), (400, &json!(said)), "{problem}");
    let events = [bad.clone(), json!({"id": "a"}), json!({"items": []})];
    let events: Vec<_> = events.iter().map(|data| json!({"thread": "t", "kind": "x.order", "data": data})).collect();
    let (_, batch) = server.http("POST", "/v1/events", "ada", Some(json!({"events": events}))).await;
    refused(&batch["items"][0], "bad_request", place);
    has(&batch["items"][1], json!({"seq": 2}));
    refused(&batch["items"][2], "bad_request", "data/id");
    // A second value of the same name could be read instead of the first.
    ada.send_text(r#"{"type":"publish","id":900,"thread":"t","kind":"x.order","data":{"id":"a","id":7}}"#).await;
    refused(&ada.recv_type("error").await, "bad_request", "data/id");

    accepted(&ada.ask(publish("t", "x.order", json!({"id": "a", "more": [1]}))).await);
    accepted(&ada.ask(publish("t", "x.other", json!(7))).await);
    let mut zoe = Socket::open(&server.url, &token_of("globex", "zoe")).await;
    accepted(&zoe.ask(publish("t", "x.order", json!(7))).await);

    // Nothing of what was refused is there, and what was there before is as it was.
    ada.subscribe("t", Some(0)).await;
    let kept: Vec<_> = ada.events(4).await.into_iter().map(|event| event["data"].clone()).collect();
    assert_eq!(kept, [json!(7), json!({"id": "a"}), json!({"id": "a", "more": [1]}), json!(7)]);
});

#[tokio::test]
async fn another_schema_counts_at_once_and_without_one_anything_goes() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for _ in 0..20 {
        for (schema, good, bad) in [("string", json!("a"), json!(1)), ("integer", json!(1), json!("a"))] {
            let (_, answer) = set(&server, "x.a", json!({"type": schema})).await;
            has(&answer, json!({"kind": "x.a"}));
            accepted(&ada.ask(publish("t", "x.a", good)).await);
            refused(&ada.ask(publish("t", "x.a", bad)).await, "bad_request", "data");
        }
        as_admin(&server, "DELETE", "/v1/kinds/x.a", None).await;
        accepted(&ada.ask(publish("t", "x.a", json!("a"))).await);
    }
}

#[tokio::test]
async fn a_schema_counts_after_a_restart_and_after_a_rebuild() {
    let mut server = Server::start(LogKind::embedded());
    set(&server, "x.order", order()).await;
    set(&server, "x.gone", order()).await;
    as_admin(&server, "DELETE", "/v1/kinds/x.gone", None).await;
    let (_, shown) = server.http("GET", "/v1/kinds/x.order", "ada", None).await;
    for rebuild in [false, true] {
        server.stop().await;
        if rebuild {
            let (data, log) = (server.data().to_str().unwrap().to_owned(), server.log().arguments());
            let mut arguments = vec!["rebuild", "--data", &data];
            arguments.extend(log.iter().map(String::as_str));
            let (code, _, said) = run(&arguments);
            assert_eq!(code, 0, "{said}");
        }
        server.up();
        server.ready().await;
        assert_eq!(server.http("GET", "/v1/kinds/x.order", "ada", None).await.1, shown);
        refused(&send(&server, "x.order", json!({})).await.1, "bad_request", "data/id");
        assert_eq!(send(&server, "x.order", json!({"id": "a"})).await.0, 201);
        assert_eq!(send(&server, "x.gone", json!({})).await.0, 201);
    }
}

#[tokio::test]
async fn another_node_goes_by_a_schema_as_soon_as_it_has_seen_its_record() {
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    set(&a, "x.order", order()).await;
    // What is not there yet is looked for in the log.
    let (status, shown) = b.http("GET", "/v1/kinds/x.order", "ada", None).await;
    assert_eq!((status, &shown["schema"]), (200, &order()), "{shown}");
    refused(&send(&b, "x.order", json!({})).await.1, "bad_request", "data/id");

    set(&b, "x.order", json!({"type": "string"})).await;
    eventually("the other node has the newer one", async || send(&a, "x.order", json!({"id": "a"})).await.0 == 400)
        .await;
    assert_eq!(send(&a, "x.order", json!("a")).await.0, 201);
    as_admin(&a, "DELETE", "/v1/kinds/x.order", None).await;
    eventually("the other node has none", async || send(&b, "x.order", json!(7)).await.0 == 201).await;
}

#[tokio::test]
async fn only_an_admin_sets_and_deletes_schemas_and_only_of_custom_kinds() {
    let server = Server::start(LogKind::embedded());
    set(&server, "x.order", order()).await;
    for scope in ["", "publish subscribe agent", "analyst", "broadcast"] {
        for (method, body) in [("PUT", Some(json!({}))), ("DELETE", None)] {
            let (status, answer) = server.http_with(method, "/v1/kinds/x.order", &token("ada", scope), body, &[]).await;
            assert_eq!((status, &answer["code"]), (403, &json!("forbidden")), "{method} {scope}: {answer}");
        }
        for path in ["/v1/kinds/x.order", "/v1/kinds"] {
            assert_eq!(server.http_with("GET", path, &token("ada", scope), None, &[]).await.0, 200, "{scope}");
        }
    }
    let other = token_of("globex", "zoe");
    refused(&server.http_with("GET", "/v1/kinds/x.order", &other, None, &[]).await.1, "not_found", "kind");
    assert_eq!(server.http_with("GET", "/v1/kinds", &other, None, &[]).await.1, json!({"kinds": []}));

    for kind in ["user_message", "x.", "order", "kind_set", &format!("x.{}", "n".repeat(127))] {
        for (method, body) in [("PUT", Some(json!({}))), ("GET", None), ("DELETE", None)] {
            let (_, answer) = as_admin(&server, method, &format!("/v1/kinds/{kind}"), body).await;
            refused(&answer, "bad_request", "kind");
        }
    }
    refused(&as_admin(&server, "PUT", "/v1/kinds/x.a?y=1", Some(json!({}))).await.1, "bad_request", "y");
    refused(&as_admin(&server, "GET", "/v1/kinds?y=1", None).await.1, "bad_request", "y");
    refused(&as_admin(&server, "GET", "/v1/kinds?cursor=no", None).await.1, "cursor_invalid", "cursor");
    // The server alone says what becomes of a kind.
    let mut ada = server.connect("ada").await;
    refused(&ada.ask(publish("t", "kind_set", json!({}))).await, "bad_request", "kind");
}

#[tokio::test]
async fn a_schema_that_is_none_or_could_cost_much_is_refused_by_its_place() {
    let server = Server::start_unlimited(LogKind::embedded());
    let doubling = (0..30).fold(json!({"d": {}}), |mut all, n| {
        let below = if n == 0 { "#/$defs/d".to_owned() } else { format!("#/$defs/d{n}") };
        all[format!("d{}", n + 1)] = json!({"anyOf": [{"$ref": below}, {"$ref": below}]});
        all
    });
    for (schema, field) in [
        (json!({"type": "text"}), "schema/type"),
        (json!({"properties": {"a": {"minimum": "1"}}}), "schema/properties/a/minimum"),
        (json!({"$ref": "https://example.org/schema"}), "schema/$ref"),
        (json!({"items": {"$ref": "#"}}), "schema/items/$ref"),
        (json!({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}), "schema/$defs/a/items/$ref"),
        (json!({"$dynamicRef": "#a"}), "schema/$dynamicRef"),
        (json!({"$id": "a"}), "schema/$id"),
        (json!({"unevaluatedProperties": false}), "schema/unevaluatedProperties"),
        (json!({"pattern": "(a+)+\\1"}), "schema/pattern"),
        (json!({"patternProperties": {"[01]*1[01]{30}": {}}}), "schema/patternProperties/[01]*1[01]{30}"),
        (json!({"pattern": "((a{900}){900}){900}"}), "schema/pattern"),
        (json!({"allOf": vec![json!({}); 5_000]}), "schema"),
        (json!({"$schema": "http://json-schema.org/draft-04/schema"}), "schema/$schema"),
    ] {
        refused(&set(&server, "x.a", schema).await.1, "bad_request", field);
    }
    refused_with(&set(&server, "x.a", json!({"$defs": doubling})).await.1, "bad_request");
    for (body, field) in [
        (r#"{"type":"object","type":"string"}"#.to_owned(), json!("schema/type")),
        (r#"{"properties":{"a":{},"b":{"enum":[{"c":1,"c":2}]}}}"#.to_owned(), json!("schema/properties/b/enum/0/c")),
        (format!("{}1{}", r#"{"not":"#.repeat(70), "}".repeat(70)), json!("schema")),
        ("[]".to_owned(), json!("schema")),
        ("true".to_owned(), json!("schema")),
        (r#"{"type":}"#.to_owned(), Value::Null),
        (String::new(), Value::Null),
    ] {
        let (status, answer) = put_text(&server, "x.a", body.clone()).await;
        assert_eq!(
            (status, &answer["code"], &answer["field"]),
            (400, &json!("bad_request"), &field),
            "{body}: {answer}"
        );
    }
    let title = |bytes: usize| format!(r#" {{"title":"{}"}} "#, "t".repeat(bytes - r#"{"title":""}"#.len()));
    assert_eq!(put_text(&server, "x.a", title(MAX_SCHEMA + 1)).await.0, 413);
    assert_eq!(put_text(&server, "x.a", title(MAX_SCHEMA + 9_000)).await.0, 413);
    assert_eq!(put_text(&server, "x.a", title(MAX_SCHEMA)).await.0, 201);

    // What is taken and wide is kept from data that is large: what it costs is known before.
    let wide = json!({"items": {"allOf": vec![json!({"type": "integer"}); 900]}});
    assert_eq!(set(&server, "x.wide", wide).await.0, 201);
    assert_eq!(send(&server, "x.wide", json!([1, 2, 3])).await.0, 201);
    refused(&send(&server, "x.wide", json!([1, 2, "3"])).await.1, "bad_request", "data/2");
    refused(&send(&server, "x.wide", json!(vec![1; 30_000])).await.1, "too_large", "data");
}

#[tokio::test]
async fn so_many_kinds_of_a_tenant_have_a_schema_and_no_more() {
    let server = Server::start_unlimited(LogKind::embedded());
    for n in 0..MAX_KINDS {
        assert_eq!(set(&server, &format!("x.{n}"), json!({"title": n.to_string()})).await.0, 201);
    }
    refused(&set(&server, "x.more", json!({})).await.1, "too_large", "kind");
    assert_eq!(set(&server, "x.0", json!({})).await.0, 200, "another one for a kind that has one");
    let (_, all) = server.http("GET", "/v1/kinds?limit=1000", "ada", None).await;
    assert_eq!(all["kinds"].as_array().unwrap().len(), MAX_KINDS);
    as_admin(&server, "DELETE", "/v1/kinds/x.0", None).await;
    assert_eq!(set(&server, "x.more", json!({})).await.0, 201);
}
