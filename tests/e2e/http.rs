//! What every route has in common: envelopes, request ids, CORS, limits on bodies; and the routes that only tell what is
//! there: health, models, providers.

use reqwest::Method;
use serde_json::json;

use crate::support::api::text;
use crate::support::client::{Answer, Request, User};
use crate::support::reply::Reply;
use crate::support::worker::{ORIGIN, PROVIDER_KEY, Worker};
use crate::support::{provider, run};

const MIB: usize = 1024 * 1024;

#[test]
fn a_request_id_is_echoed_in_header_and_body() {
    run(async {
        let user = Worker::anyone().await;
        for path in ["/ai/quota", "/ai/chat/sessions/nobody", "/nowhere"] {
            let answer = user.request(Method::GET, path).header("X-Request-ID", "trace-42").send().await;
            assert_eq!((answer.header("x-request-id"), &answer.body["request_id"]), (Some("trace-42"), &json!("trace-42")));
        }
        let (one, two) = (user.get("/ai/quota").await, user.get("/ai/quota").await);
        assert_ne!(one.body["request_id"], two.body["request_id"], "each request without an id gets its own");
        let script = provider().script(Reply::happy(&["x"], (3, 1)));
        let request = user.streaming(&json!({"message": script.message("x")})).header("X-Request-ID", "trace-43");
        let mut stream = request.stream().await;
        assert_eq!(stream.header("x-request-id"), Some("trace-43"));
        stream.rest().await;
    });
}

#[test]
fn unknown_paths_and_methods_are_told_in_the_envelope() {
    run(async {
        let user = Worker::anyone().await;
        // Routes that come later have no stubs.
        for path in ["/nowhere", "/ai", "/ai/chat/", "/ai/chat/sessions/x/y", "/ai/writing/continue", "/ai/rag/search"] {
            for method in [Method::GET, Method::POST] {
                let answer = user.request(method.clone(), path).send().await;
                assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text);
                answer.error(404, 1004);
            }
        }
        for (method, path, allowed) in [
            (Method::DELETE, "/ai/chat", "POST"),
            (Method::GET, "/ai/chat/stream", "POST"),
            (Method::POST, "/ai/quota", "GET"),
            (Method::PATCH, "/ai/chat/sessions/x", "PUT"),
        ] {
            let answer = user.request(method.clone(), path).send().await.error(405, 1019);
            let allow = answer.header("allow").unwrap_or_default();
            assert!(allow.contains(allowed), "{method} {path}: {allow}");
        }
    });
}

#[test]
fn health_is_public_and_models_and_providers_are_listed() {
    run(async {
        let user = Worker::anyone().await;
        let health = user.with_token(None).get("/ai/health").await.ok();
        assert_eq!((&health["status"], &health["service"]), (&json!("healthy"), &json!("ai")));
        let seconds = health["timestamp"].as_i64().expect("a timestamp");
        assert!((seconds - crate::support::token::now_s()).abs() < 60, "unix seconds: {seconds}");

        let models = user.get("/ai/models").await;
        assert!(!models.text.contains(PROVIDER_KEY));
        let models = models.ok();
        let ids: Vec<_> = models.as_array().expect("an array").iter().map(|model| text(model, "id")).collect();
        assert_eq!(ids, ["test-model", "other-model", "small-model"]);
        for model in models.as_array().expect("an array") {
            assert!(!text(model, "name").is_empty() && !text(model, "provider").is_empty(), "{model}");
            assert!(model["maxTokens"].as_u64().is_some_and(|tokens| tokens > 0), "{model}");
            assert!(model["costPer1k"].is_number(), "{model}");
        }
        let providers = user.get("/ai/providers").await;
        assert!(!providers.text.contains(PROVIDER_KEY));
        let providers = providers.ok();
        for provider in providers.as_array().expect("an array") {
            assert!(!text(provider, "name").is_empty() && !text(provider, "displayName").is_empty(), "{provider}");
            assert_eq!(provider["status"], "active");
        }
        let offered = providers.as_array().expect("an array").iter().flat_map(|provider| provider["models"].as_array());
        assert_eq!(offered.flatten().count(), 3, "{providers}");

        let name = text(&models[0], "provider");
        assert_eq!(user.get(&format!("/ai/models?provider={name}")).await.ok(), models);
        assert_eq!(user.get("/ai/models?provider=nobody").await.ok(), json!([]));
    });
}

fn preflight(user: &User, origin: &str, path: &str) -> Request {
    let request = user.with_token(None).request(Method::OPTIONS, path).header("Origin", origin);
    let wanted = "authorization,content-type,idempotency-key,last-event-id,x-request-id,if-match";
    request.header("Access-Control-Request-Method", "PUT").header("Access-Control-Request-Headers", wanted)
}

/// A header that lists things, in lower case.
fn list(answer: &Answer, name: &str) -> Vec<String> {
    let value = answer.header(name).unwrap_or_default().to_ascii_lowercase();
    value.split(',').map(|item| item.trim().to_owned()).collect()
}

#[test]
fn an_allowed_origin_passes_the_preflight() {
    run(async {
        let user = Worker::anyone().await;
        for origin in [ORIGIN, "http://localhost:5173"] {
            let answer = preflight(&user, origin, "/ai/chat/stream").send().await;
            assert_eq!((answer.status, answer.text.as_str()), (204, ""));
            assert_eq!(answer.header("access-control-allow-origin"), Some(origin));
            assert_eq!(answer.header("access-control-allow-credentials"), None);
            assert!(list(&answer, "vary").contains(&"origin".to_owned()));
            let methods = list(&answer, "access-control-allow-methods");
            assert!(["get", "post", "put", "delete"].iter().all(|method| methods.contains(&(*method).to_owned())), "{methods:?}");
            let headers = list(&answer, "access-control-allow-headers");
            for header in ["authorization", "content-type", "idempotency-key", "last-event-id", "if-match", "x-request-id"] {
                assert!(headers.contains(&header.to_owned()), "{header} in {headers:?}");
            }
        }
    });
}

#[test]
fn answers_errors_and_streams_carry_cors_headers() {
    run(async {
        let user = Worker::anyone().await;
        for (caller, path, status) in
            [(&user, "/ai/quota", 200), (&user.with_token(None), "/ai/quota", 401), (&user, "/nowhere", 404)]
        {
            let answer = caller.request(Method::GET, path).header("Origin", ORIGIN).send().await;
            assert_eq!((answer.status, answer.header("access-control-allow-origin")), (status, Some(ORIGIN)), "{path}");
            let exposed = list(&answer, "access-control-expose-headers");
            for header in ["x-request-id", "retry-after", "etag"] {
                assert!(exposed.contains(&header.to_owned()), "{header} in {exposed:?}");
            }
        }
        let script = provider().script(Reply::happy(&["x"], (3, 1)));
        let request = user.streaming(&json!({"message": script.message("x")})).header("Origin", ORIGIN);
        let mut stream = request.stream().await;
        assert_eq!(stream.header("access-control-allow-origin"), Some(ORIGIN));
        stream.rest().await;
    });
}

#[test]
fn lookalike_origins_get_nothing() {
    run(async {
        let user = Worker::anyone().await;
        let lookalikes = [
            "https://write.example.attacker.com",
            "https://attacker-write.example",
            "https://awrite.example",
            "https://sub.write.example",
            "http://write.example",
            "https://write.example:8443",
            "https://write.examplex",
            "https://WRITE.example.",
            "null",
            "*",
            "http://localhost:51730",
            "https://localhost:5173",
        ];
        for origin in lookalikes {
            let asked = [
                preflight(&user, origin, "/ai/chat").send().await,
                user.request(Method::GET, "/ai/quota").header("Origin", origin).send().await,
            ];
            for answer in asked {
                assert_eq!(answer.header("access-control-allow-origin"), None, "{origin}");
            }
        }
    });
}

/// A chat request of exactly this many bytes.
fn sized(message: &str, bytes: usize) -> String {
    let body = json!({"message": message, "pad": ""}).to_string();
    let padding = " ".repeat(bytes - body.len());
    format!("{body}{padding}")
}

#[test]
fn a_body_over_one_mebibyte_is_413_by_length_and_while_reading() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["刚好"], (3, 1)));
        let message = script.message("x");
        for path in ["/ai/chat", "/ai/chat/stream", "/ai/chat/sessions"] {
            let over = sized(&message, MIB + 1);
            let by_length = user.request(Method::POST, path).body(over.clone()).send().await;
            assert_eq!(by_length.status, 413, "{path}: {}", by_length.text);
            by_length.error(413, 3521);

            let parts: Vec<_> = over.as_bytes().chunks(64 * 1024).map(|part| std::io::Result::Ok(part.to_vec())).collect();
            let chunked = reqwest::Body::wrap_stream(futures::stream::iter(parts));
            user.request(Method::POST, path).body(chunked).send().await.error(413, 3521);
        }
        assert!(script.calls().is_empty());
        let whole = user.request(Method::POST, "/ai/chat").body(sized(&message, MIB)).send().await.ok();
        assert_eq!(whole["reply"], "刚好", "exactly one mebibyte is allowed, and the Worker lives on");
    });
}

#[test]
fn a_deeply_nested_body_is_400_and_the_next_request_is_fine() {
    run(async {
        let user = Worker::anyone().await;
        let deep =
            |open: &str, close: &str| format!("{{\"message\":\"x\",\"pad\":{}1{}}}", open.repeat(10_000), close.repeat(10_000));
        for body in [deep("[", "]"), deep("{\"a\":", "}"), "[".repeat(10_000), deep("[", "")] {
            for path in ["/ai/chat", "/ai/chat/sessions"] {
                user.request(Method::POST, path).body(body.clone()).send().await.error(400, 1001);
            }
        }
        user.get("/ai/quota").await.ok();
        assert_eq!(user.charged().await, 0);
    });
}
