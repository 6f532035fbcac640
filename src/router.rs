//! Every route of the product in one table, and the way a request takes: id → CORS → route → caller → handler → envelope.
//!
//! Invariant: a handler of a `User` route never runs without a verified token, and every answer, refusals included,
//! leaves through `respond::finish`.

use std::rc::Rc;

use futures::future::LocalBoxFuture;
use worker::{Env, Method, Request, Response};

use crate::config::Config;
use crate::error::ApiError;
use crate::identity::signature::{self, Signed};
use crate::identity::{Caller, Role};
use crate::platform::request::Ctx;
use crate::platform::{clock, ids, log, respond};
use crate::quota::client::LedgerClient;
use crate::{chat, quota, system};

/// Where every route lives.
pub const PREFIX: &str = "/api/v1";

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Public,
    /// A verified token.
    User,
    /// An administrator's token.
    Admin,
    /// An administrator's token, or a request signed with a service key.
    Service,
}

type Answer = Result<Response, ApiError>;

/// One line of the table.
pub struct Route {
    /// HTTP method.
    pub method: Method,
    /// Path below [`PREFIX`]; `:name` is a parameter.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
    handler: fn(Ctx) -> LocalBoxFuture<'static, Answer>,
}

macro_rules! routes {
    ($($method:ident $path:literal $access:ident $handler:path;)*) => {
        &[$(Route { method: Method::$method, path: $path, access: Access::$access, handler: |ctx| Box::pin($handler(ctx)) }),*]
    };
}

/// The product's routes. Order does not matter: no path is matched by two patterns.
pub static ROUTES: &[Route] = routes! {
    Get    "/ai/health"                                             Public system::routes::health;
    Get    "/ai/models"                                             User   system::routes::models;
    Get    "/ai/providers"                                          User   system::routes::providers;

    Post   "/ai/chat"                                               User   chat::routes::send;
    Post   "/ai/chat/stream"                                        User   chat::routes::send_stream;
    Get    "/ai/chat/sessions"                                      User   chat::routes::list;
    Post   "/ai/chat/sessions"                                      User   chat::routes::create;
    Get    "/ai/chat/sessions/:id"                                  User   chat::routes::read;
    Put    "/ai/chat/sessions/:id"                                  User   chat::routes::update;
    Delete "/ai/chat/sessions/:id"                                  User   chat::routes::delete;
    Get    "/ai/chat/sessions/:id/messages"                         User   chat::routes::messages;
    Delete "/ai/chat/sessions/:id/messages"                         User   chat::routes::clear;
    Put    "/ai/chat/sessions/:id/messages/:message"                User   chat::routes::edit;
    Post   "/ai/chat/sessions/:id/messages/:message/regenerate"     User   chat::routes::regenerate;
    Put    "/ai/chat/sessions/:id/path"                             User   chat::routes::set_path;
    Post   "/ai/chat/sessions/:id/stop"                             User   chat::routes::stop;
    Get    "/ai/chat/sessions/:id/stream"                           User   chat::routes::resume;

    Get    "/ai/quota"                                              User   quota::routes::one;
    Get    "/ai/quota/all"                                          User   quota::routes::all;
    Get    "/ai/quota/statistics"                                   User   quota::routes::statistics;
    Get    "/ai/quota/transactions"                                 User   quota::routes::transactions;
    Get    "/ai/quota/explain"                                      User   quota::routes::explain;
    Post   "/ai/quota/quote"                                        User   chat::routes::quote;
    Post   "/ai/quota/recharge"                                     Service quota::admin_routes::recharge;
    Post   "/ai/quota/redeem"                                       User   quota::routes::redeem;
    Get    "/ai/usage"                                              User   quota::routes::usage;
    Get    "/ai/notifications"                                      User   quota::routes::notifications;
    Post   "/ai/notifications/read"                                 User   quota::routes::read_all;
    Post   "/ai/notifications/:notification/read"                   User   quota::routes::read_one;

    Get    "/admin/quota"                                           Admin  quota::admin_routes::users;
    Get    "/admin/quota/:user"                                     Admin  quota::admin_routes::read;
    Put    "/admin/quota/:user"                                     Admin  quota::admin_routes::set_limit;
    Put    "/admin/quota/:user/role"                                Admin  quota::admin_routes::set_role;
    Post   "/admin/quota/:user/suspend"                             Admin  quota::admin_routes::suspend;
    Post   "/admin/quota/:user/activate"                            Admin  quota::admin_routes::activate;
    Post   "/admin/quota/:user/reset"                               Admin  quota::admin_routes::reset;
    Post   "/admin/quota/:user/initialize"                          Admin  quota::admin_routes::initialize;
    Get    "/admin/quota/:user/reconcile"                           Admin  quota::admin_routes::reconcile;
    Get    "/admin/quota-codes"                                     Admin  quota::admin_routes::codes;
    Post   "/admin/quota-codes"                                     Admin  quota::admin_routes::create_codes;
    Delete "/admin/quota-codes/:code"                               Admin  quota::admin_routes::void_code;
};

/// Answers a request. Never fails: what goes wrong becomes an error body.
///
/// # Errors
/// Only when the runtime refuses a response header.
pub async fn serve(request: Request, env: Env) -> worker::Result<Response> {
    let request_id = request_id(&request);
    let origin = request.headers().get("origin").ok().flatten();
    let config = match Config::of(&env) {
        Ok(config) => config,
        Err(error) => return respond::finish(respond::refuse(&request_id, &error), &request_id, None, &[]),
    };
    if request.method() == Method::Options {
        return respond::preflight(&request_id, origin.as_deref(), &config.allowed_origins);
    }
    let allowed = config.clone();
    let response = match dispatch(request, env, config, request_id.clone()).await {
        Ok(response) => response,
        Err(error) => respond::refuse(&request_id, &error),
    };
    respond::finish(response, &request_id, origin.as_deref(), &allowed.allowed_origins)
}

async fn dispatch(request: Request, env: Env, config: Rc<Config>, request_id: String) -> Answer {
    let url = request.url().map_err(|_| ApiError::not_found("接口"))?;
    let (route, params) = find(&request.method(), url.path())?;
    let query = url.query_pairs().into_owned().collect();
    let mut ctx = Ctx { request, env, config, params, query, caller: None, bytes: None, request_id };
    match route.access {
        Access::Public => {}
        Access::User => ctx.caller = Some(authenticate(&ctx)?),
        Access::Admin => ctx.caller = Some(administrator(authenticate(&ctx)?)?),
        Access::Service if ctx.header("x-key-id").is_some() => signed(&mut ctx).await?,
        Access::Service => ctx.caller = Some(administrator(authenticate(&ctx)?)?),
    }
    (route.handler)(ctx).await
}

fn authenticate(ctx: &Ctx) -> Result<Caller, ApiError> {
    ctx.config.verifier.verify(&bearer(&ctx.request)?, clock::now_ms() / 1000)
}

fn administrator(caller: Caller) -> Result<Caller, ApiError> {
    if caller.role == Role::Admin { Ok(caller) } else { Err(ApiError::forbidden("需要管理员权限")) }
}

/// Checks a signed service request; its nonce works once, also across kills.
async fn signed(ctx: &mut Ctx) -> Result<(), ApiError> {
    let header = |name: &str| ctx.header(name).ok_or_else(ApiError::signature_invalid);
    let (key_id, nonce, signature) = (header("x-key-id")?, header("x-nonce")?, header("x-signature")?);
    let timestamp_s = header("x-timestamp")?.parse().map_err(|_| ApiError::signature_invalid())?;
    let body = ctx.read().await?;
    let url = ctx.request.inner().url();
    let path = url.splitn(4, '/').nth(3).map_or_else(|| "/".to_owned(), |rest| format!("/{rest}"));
    let method = method_name(&ctx.request.method());
    let signed = Signed { timestamp_s, nonce: &nonce, method, path: &path, body: &body };
    signed.verify(&ctx.config.service_keys, &key_id, &signature, clock::now_ms() / 1000)?;
    let kept_ms = 2 * signature::WINDOW_S * 1_000 + 60_000;
    if !LedgerClient::use_nonce(&ctx.env, &key_id, &nonce, &ids::new_id(clock::now_ms()), kept_ms).await? {
        return Err(ApiError::signature_invalid());
    }
    ctx.bytes = Some(body);
    Ok(())
}

/// The route of `method` and `path`, with the path's parameters.
fn find(method: &Method, path: &str) -> Result<(&'static Route, Vec<String>), ApiError> {
    thread_local! {
        static PATHS: matchit::Router<Vec<&'static Route>> = paths();
    }
    let missing = || ApiError::not_found("接口");
    let path = path.strip_prefix(PREFIX).ok_or_else(missing)?;
    PATHS.with(|paths| {
        let found = paths.at(path).map_err(|_| missing())?;
        // A HEAD is answered as its GET; the runtime drops the body.
        let wanted = if *method == Method::Head { &Method::Get } else { method };
        let Some(route) = found.value.iter().find(|route| route.method == *wanted) else {
            let allow: Vec<&str> = found.value.iter().map(|route| method_name(&route.method)).collect();
            return Err(ApiError::method_not_allowed(allow.join(", ")));
        };
        let params = found.params.iter().map(|(_, value)| decoded(value)).collect();
        Ok((*route, params))
    })
}

/// A path segment without its percent-encoding; one that is not UTF-8 stays as it is, and names nothing.
fn decoded(segment: &str) -> String {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = tail.get(..2).filter(|_| first == b'%').and_then(|pair| hex::decode(pair).ok());
        match hex.as_deref() {
            Some([byte]) => {
                bytes.push(*byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| segment.to_owned())
}

fn paths() -> matchit::Router<Vec<&'static Route>> {
    let mut by_path: std::collections::BTreeMap<&str, Vec<&'static Route>> = std::collections::BTreeMap::new();
    for route in ROUTES {
        by_path.entry(route.path).or_default().push(route);
    }
    let mut router = matchit::Router::new();
    for (path, routes) in by_path {
        if let Err(cause) = router.insert(path, routes) {
            log::error("route_table", path, &cause);
        }
    }
    router
}

fn method_name(method: &Method) -> &'static str {
    match method {
        Method::Get => "GET",
        Method::Post => "POST",
        Method::Put => "PUT",
        Method::Patch => "PATCH",
        Method::Delete => "DELETE",
        _ => "OPTIONS",
    }
}

/// The caller's `X-Request-ID` if it is fit for a header and a log, else a new one.
fn request_id(request: &Request) -> String {
    let fit =
        |id: &String| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b));
    let given = request.headers().get("x-request-id").ok().flatten();
    given.filter(fit).unwrap_or_else(|| format!("req_{}", ids::new_id(clock::now_ms())))
}

fn bearer(request: &Request) -> Result<String, ApiError> {
    let header = request.headers().get("authorization").ok().flatten().ok_or_else(ApiError::token_missing)?;
    let (scheme, token) = header.split_once(' ').ok_or_else(ApiError::token_malformed)?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.contains(' ') {
        return Err(ApiError::token_malformed());
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_by_its_own_path() {
        for route in ROUTES {
            let path: String = route
                .path
                .split('/')
                .map(|part| if part.starts_with(':') { "/x1" } else { part }.to_owned())
                .fold(String::new(), |path, part| format!("{path}/{}", part.trim_start_matches('/')));
            let path = format!("{PREFIX}/{}", path.trim_start_matches('/'));
            let (found, params) = find(&route.method, &path).unwrap();
            assert_eq!((found.path, found.method.as_ref()), (route.path, route.method.as_ref()));
            assert_eq!(params.len(), route.path.matches(':').count());
        }
    }

    #[test]
    fn path_parameters_are_decoded() {
        assert_eq!(decoded("a%2Fb%E7%A0%9A%"), "a/b砚%");
        assert_eq!(decoded("%ff"), "%ff");
    }

    #[test]
    fn unknown_paths_are_404_and_wrong_methods_405() {
        assert_eq!(find(&Method::Get, "/api/v1/ai/nothing").err().map(|e| e.status), Some(404));
        assert_eq!(find(&Method::Get, "/ai/health").err().map(|e| e.status), Some(404));
        let error = find(&Method::Delete, "/api/v1/ai/chat").err().unwrap();
        assert_eq!((error.status, error.code, error.allow.as_deref()), (405, 1019, Some("POST")));
        assert!(find(&Method::Head, "/api/v1/ai/health").is_ok());
    }
}
