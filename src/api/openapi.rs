//! `/openapi.json`: this API, described in OpenAPI 3.1.

use super::reply::Reply;
use http::StatusCode;

const DOCUMENT: &str = include_str!("openapi.json");

pub fn document() -> Reply {
    Reply::json(StatusCode::OK, DOCUMENT)
}

/// The document says what the route table says, and nothing else.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::routes::{self, Route, Takes};
    use crate::api::problem::ApiError;
    use crate::api::Endpoint;
    use serde_json::Value;
    use std::collections::{BTreeMap, BTreeSet};

    fn read() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    /// By (path, method in small letters).
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

    /// `/status/:jobId` is `/status/{jobId}` there.
    fn place(route: &Route) -> (String, String) {
        let segment = |s: &str| s.strip_prefix(':').map_or(s.to_owned(), |name| format!("{{{name}}}"));
        let path: Vec<String> = route.pattern.split('/').map(segment).collect();
        (path.join("/"), route.method.as_str().to_ascii_lowercase())
    }

    #[test]
    fn it_is_of_this_version() {
        let document = read();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(document["servers"], serde_json::json!([{ "url": "/" }]));
    }

    #[test]
    fn its_operations_are_the_routes() {
        let document = read();
        let described: BTreeSet<_> = operations(&document).into_keys().collect();
        let routed: BTreeSet<_> = routes::all().map(place).collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn each_operation_is_as_its_route() {
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
                route.takes != Takes::Nothing,
                "the body of {told}"
            );
            assert!(operation["summary"].is_string(), "{told} has no summary");
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{told}: its id is another's");
        }
    }

    /// The parameters in the path are those of the pattern.
    #[test]
    fn paths_name_their_parameters() {
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
    fn its_codes_are_those_of_the_errors() {
        let document = read();
        let codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"].as_array();
        let described: BTreeSet<&str> = codes.unwrap().iter().map(|code| code.as_str().unwrap()).collect();
        let errors = ApiError::each();
        assert_eq!(described, errors.iter().map(ApiError::code).collect());
    }

    fn target<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
        let Some(pointer) = value["$ref"].as_str() else { return value };
        let found = pointer.strip_prefix('#').and_then(|pointer| document.pointer(pointer));
        found.unwrap_or_else(|| panic!("{pointer} leads nowhere"))
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
    fn references_lead_somewhere_and_nothing_is_left_over() {
        let document = read();
        let mut used = BTreeSet::new();
        references(&document, &mut used);
        for pointer in &used {
            assert!(document.pointer(pointer.trim_start_matches('#')).is_some(), "{pointer}");
        }
        for (kind, parts) in document["components"].as_object().unwrap() {
            for name in parts.as_object().unwrap().keys().filter(|_| kind != "securitySchemes") {
                let pointer = format!("#/components/{kind}/{name}");
                assert!(used.contains(pointer.as_str()), "{pointer} is used nowhere");
            }
        }
        let ids: Vec<&Value> = operations(&document).values().map(|o| &o["operationId"]).collect();
        for (name, link) in document["components"]["links"].as_object().unwrap() {
            assert!(ids.contains(&&link["operationId"]), "the link {name} leads nowhere");
        }
    }

    #[test]
    fn a_job_id_in_the_path_is_asked_for() {
        let left_out = routes::find(&http::Method::GET, "/status");
        let routes::Found::Route(route, _) = left_out else { panic!("{left_out:?}") };
        assert_eq!(route.endpoint, Endpoint::StatusWithoutId);
        assert!(!operations(&read()).contains_key(&place(route)));
    }
}
