//! `/openapi.json`: the description of this API in OpenAPI 3.1.

use super::reply::Reply;
use http::StatusCode;

const DOCUMENT: &str = include_str!("openapi.json");

/// The description. It is compiled in.
pub fn document() -> Reply {
    Reply::json(StatusCode::OK, DOCUMENT)
}

/// The document must match the route table and the errors.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Endpoint;
    use crate::api::problem::ApiError;
    use crate::api::routes::{self, BodyMode, Route};
    use serde_json::Value;
    use std::collections::{BTreeMap, BTreeSet};

    fn read() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    /// By (path, method in lower case).
    fn operations(document: &Value) -> BTreeMap<(String, String), &Value> {
        let mut all = BTreeMap::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in
                item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters")
            {
                all.insert((path.clone(), method.clone()), operation);
            }
        }
        all
    }

    /// Path and method of a route in the notation of OpenAPI: `/status/{jobId}` for `/status/:jobId`.
    fn place(route: &Route) -> (String, String) {
        let segment = |s: &str| s.strip_prefix(':').map_or(s.to_owned(), |name| format!("{{{name}}}"));
        let path: Vec<String> = route.pattern.split('/').map(segment).collect();
        (path.join("/"), route.method.as_str().to_ascii_lowercase())
    }

    #[test]
    fn the_version_is_that_of_the_crate() {
        let document = read();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(document["servers"], serde_json::json!([{ "url": "/" }]));
    }

    #[test]
    fn operations_match_the_routes() {
        let document = read();
        let described: BTreeSet<_> = operations(&document).into_keys().collect();
        let routed: BTreeSet<_> = routes::all().map(place).collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn statuses_keys_and_bodies_match_the_routes() {
        let document = read();
        let described = operations(&document);
        let mut ids = BTreeSet::new();
        for route in routes::all() {
            let told = format!("{} {}", route.method, route.pattern);
            let operation = described[&place(route)];
            let statuses = operation["responses"].as_object().unwrap().keys().map(|s| s.parse().unwrap());
            let statuses: BTreeSet<u16> = statuses.collect();
            assert_eq!(statuses, route.statuses().collect(), "statuses of {told}");
            let is_open = operation["security"].as_array().unwrap().is_empty();
            assert_eq!(is_open, route.scope.is_none(), "the key of {told}");
            assert_eq!(
                operation["requestBody"].is_object(),
                route.takes != BodyMode::Nothing,
                "the body of {told}"
            );
            assert!(operation["summary"].is_string(), "{told} has no summary");
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{told}: not unique");
        }
    }

    #[test]
    fn path_parameters_match_the_paths() {
        let document = read();
        for (path, item) in document["paths"].as_object().unwrap() {
            let all = item.as_object().unwrap().iter().flat_map(|(name, value)| match name.as_str() {
                "parameters" => value.as_array(),
                _ => value["parameters"].as_array(),
            });
            let in_path = all.flatten().map(|p| target(&document, p)).filter(|p| p["in"] == "path");
            let named: BTreeSet<String> =
                in_path.map(|p| format!("{{{}}}", p["name"].as_str().unwrap())).collect();
            let wanted = path.split('/').filter(|s| s.starts_with('{')).map(str::to_owned).collect();
            assert_eq!(named, wanted, "{path}");
        }
    }

    #[test]
    fn codes_match_the_errors() {
        let document = read();
        let codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"].as_array();
        let described: BTreeSet<&str> = codes.unwrap().iter().map(|code| code.as_str().unwrap()).collect();
        let errors = ApiError::each();
        assert_eq!(described, errors.iter().map(ApiError::code).collect());
    }

    fn target<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
        let Some(pointer) = value["$ref"].as_str() else { return value };
        let found = pointer.strip_prefix('#').and_then(|pointer| document.pointer(pointer));
        found.unwrap_or_else(|| panic!("{pointer} does not exist"))
    }

    fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members.values().for_each(|member| references(member, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn references_exist_and_all_components_are_used() {
        let document = read();
        let mut used = BTreeSet::new();
        references(&document, &mut used);
        for pointer in &used {
            assert!(document.pointer(pointer.trim_start_matches('#')).is_some(), "{pointer}");
        }
        for (kind, parts) in document["components"].as_object().unwrap() {
            for name in parts.as_object().unwrap().keys().filter(|_| kind != "securitySchemes") {
                let pointer = format!("#/components/{kind}/{name}");
                assert!(used.contains(pointer.as_str()), "{pointer} is unused");
            }
        }
        let ids: Vec<&Value> = operations(&document).values().map(|o| &o["operationId"]).collect();
        for (name, link) in document["components"]["links"].as_object().unwrap() {
            assert!(ids.contains(&&link["operationId"]), "the link {name} names an unknown operation");
        }
    }

    #[test]
    fn the_route_for_a_missing_job_id_is_not_described() {
        let left_out = routes::find(&http::Method::GET, "/status");
        let routes::RouteMatch::Route(route, _) = left_out else { panic!("{left_out:?}") };
        assert_eq!(route.endpoint, Endpoint::StatusWithoutId);
        assert!(!operations(&read()).contains_key(&place(route)));
    }
}
