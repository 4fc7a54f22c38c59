use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn compiled(schema: &Value) -> Schema {
    Schema::compile(&schema.to_string()).unwrap_or_else(|error| panic!("{schema}: {error}"))
}

fn raw(data: &str) -> Box<RawValue> {
    RawValue::from_string(data.to_owned()).expect("it is JSON")
}

/// Where a schema is at fault, and what is said.
fn refused(schema: &str) -> (String, String) {
    let error = Schema::compile(schema).err().unwrap_or_else(|| panic!("{schema:.200} is taken"));
    (error.field.clone().unwrap_or_default().into_owned(), error.message.into_owned())
}

#[test]
fn data_is_refused_by_its_first_fault_in_plain_words() {
    let order = compiled(&json!({
        "$schema": DRAFT,
        "type": "object",
        "required": ["id", "items"],
        "additionalProperties": false,
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$", "x-note": "ours"},
            "items": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"$ref": "#/$defs/item"}},
            "state": {"enum": ["open", "paid", 3]},
            "how": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "who": {"oneOf": [{"required": ["user"]}, {"required": ["group"]}]},
            "tags": {"uniqueItems": true, "contains": {"const": "a"}, "items": {"not": {"const": "b"}}},
            "names": {"propertyNames": {"maxLength": 3}, "minProperties": 1, "dependentRequired": {"a": ["b"]}},
            "v": {"const": 1},
            "never": false
        },
        "$defs": {"item": {"properties": {
            "price": {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5},
            "n": {"type": ["integer", "null"], "maximum": 9},
            "a/b": {"minLength": 2}
        }}}
    }));
    let with = |more: &str| format!(r#"{{"id":"AB1","items":[{{"price":1.5}}]{more}}}"#);
    assert_eq!(order.check(&raw(&with(""))), Ok(()));
    for (data, said) in [
        ("[]", "data must be an object, not a list"),
        (r#"{"id":"AB1"}"#, "data/items is missing"),
        (r#"{"id":7,"items":[1]}"#, "data/id must be a string, not a number"),
        (r#"{"id":"no","items":[1]}"#, "data/id must match the pattern ^[A-Z]{2}[0-9]+$"),
        (r#"{"id":"AB1","items":[]}"#, "data/items must have at least 1 item"),
        (r#"{"id":"AB1","items":[1,1,1,1]}"#, "data/items must have at most 3 items"),
        (r#"{"id":"AB1","items":[{"price":"1"}]}"#, "data/items/0/price must be a number, not a string"),
        (r#"{"id":"AB1","items":[{},{"price":0}]}"#, "data/items/1/price must be more than 0"),
        (r#"{"id":"AB1","items":[{"price":0.7}]}"#, "data/items/0/price must be a multiple of 0.5"),
        (r#"{"id":"AB1","items":[{"n":1.5}]}"#, "data/items/0/n must be null or a whole number, not a number"),
        (r#"{"id":"AB1","items":[{"n":10}]}"#, "data/items/0/n must be at most 9"),
        (r#"{"id":"AB1","items":[{"a/b":"é"}]}"#, "data/items/0/a~1b must have at least 2 characters"),
        (&with(r#","colour":1"#), "data/colour is a field that may not be there"),
        (&with(r#","state":"gone""#), r#"data/state must be one of "open", "paid", 3"#),
        (&with(r#","how":1"#), "data/how does not have one of the shapes that it may have"),
        (&with(r#","who":{"user":1,"group":1}"#), "data/who must have exactly one of the shapes that it may have"),
        (&with(r#","tags":["a","a"]"#), "data/tags must not have the same item twice"),
        (&with(r#","tags":["a","b"]"#), "data/tags/1 has a shape that it may not have"),
        (&with(r#","tags":["c"]"#), "data/tags has too few or too many of the items that it must have"),
        (&with(r#","names":{}"#), "data/names must have at least 1 field"),
        (&with(r#","names":{"a":1}"#), "data/names/b is missing"),
        (&with(r#","v":2"#), "data/v must be 1"),
        (&with(r#","never":2"#), "data/never may not be there"),
        (
            &with(r#","names":{"long":1}"#),
            r#"data/names may not have a field of the name "long": it must have at most 3 characters"#,
        ),
        (r#"{"id":"AB1","id":"AB1","items":[1]}"#, "data/id stands twice"),
        (&with(r#","other":{"x":[{"y":1,"y":2}]}"#), "data/other/x/0/y stands twice"),
    ] {
        let refused = order.check(&raw(data)).expect_err(data);
        assert_eq!((refused.code, &*refused.message), (Code::BadRequest, said), "{data}");
        let field = refused.field.expect("the field is named");
        assert!(said.starts_with(&*field) && field.starts_with("data"), "{field}: {said}");
    }
}

#[test]
fn no_more_of_data_is_repeated_than_a_bounded_part_of_its_names() {
    let schema = compiled(&json!({
        "additionalProperties": {"additionalProperties": {"type": "null"}, "propertyNames": {"maxLength": 30000}}
    }));
    let long = "n".repeat(20_000);
    for data in [format!(r#"{{"{long}":{{"{long}":"{long}"}}}}"#), format!(r#"{{"a":{{"{long}{long}":null}}}}"#)] {
        let refused = schema.check(&raw(&data)).expect_err("it is no null");
        let (said, field) = (refused.message.len(), refused.field.expect("it is named").len());
        assert!(said < 500 && field < 300, "{said} {field}");
    }
}

#[test]
fn what_is_wrong_with_a_schema_is_said_by_its_place() {
    for (schema, field, said) in [
        ("[]", "schema", "must be an object"),
        ("true", "schema", "must be an object"),
        (r#"{"type":"text"}"#, "schema/type", "does not have one of the shapes"),
        (r#"{"minLength":-1}"#, "schema/minLength", "must be at least 0"),
        (r#"{"properties":{"a":{"maxLength":"9"}}}"#, "schema/properties/a/maxLength", "must be a whole number"),
        (r#"{"properties":{"a":1}}"#, "schema/properties/a", "must be a schema"),
        (r#"{"allOf":{}}"#, "schema/allOf", "must be a list of schemas"),
        (r#"{"allOf":[]}"#, "schema/allOf", "at least 1 item"),
        (r#"{"required":"a"}"#, "schema/required", "must be a list"),
        (r#"{"properties":{"a":{"requierd":[]}}}"#, "schema/properties/a/requierd", "no keyword"),
        (r#"{"items":{"unevaluatedProperties":false}}"#, "schema/items/unevaluatedProperties", "no keyword"),
        (r#"{"unevaluatedItems":false}"#, "schema/unevaluatedItems", "no keyword"),
        (r#"{"$id":"https://example.org/a"}"#, "schema/$id", "no keyword"),
        (r##"{"$dynamicRef":"#a"}"##, "schema/$dynamicRef", "no keyword"),
        (r#"{"$anchor":"a"}"#, "schema/$anchor", "no keyword"),
        (r#"{"contentMediaType":"application/json"}"#, "schema/contentMediaType", "no keyword"),
        (r#"{"$schema":"http://json-schema.org/draft-07/schema#"}"#, "schema/$schema", "2020-12"),
        (r#"{"$ref":"https://example.org/a"}"#, "schema/$ref", "nothing but its own definitions"),
        (r#"{"$ref":"file:///etc/passwd"}"#, "schema/$ref", "nothing but its own definitions"),
        (r##"{"properties":{"a":{"$ref":"#"}}}"##, "schema/properties/a/$ref", "nothing but its own definitions"),
        (r##"{"$ref":"#/$defs/a"}"##, "schema/$ref", "not there"),
        (r##"{"items":{"$defs":{}}}"##, "schema/items/$defs", "at the top"),
        (r##"{"$defs":{"a":{"items":{"$ref":"#/$defs/a"}}}}"##, "schema/$defs/a/items/$ref", "in a circle"),
        (
            r##"{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"not":{"$ref":"#/$defs/a"}}}}"##,
            "schema/$defs/b/not/$ref",
            "in a circle",
        ),
        (r#"{"$defs":{"a":{"typ":1}}}"#, "schema/$defs/a/typ", "no keyword"),
        (r#"{"pattern":"("}"#, "schema/pattern", "no regular expression"),
        (r#"{"pattern":"[01]*1[01]{20}"}"#, "schema/pattern", "too complex"),
        (r#"{"pattern":7}"#, "schema/pattern", "must be a string"),
        (r#"{"patternProperties":{"(a/":{}}}"#, "schema/patternProperties/(a~1", "no regular expression"),
        (r#"{"type":"object","type":"object"}"#, "schema/type", "twice"),
        (r#"{"enum":[{"a":1,"a":2}]}"#, "schema/enum/0/a", "twice"),
        (r#"{"const":1e999}"#, "schema", "64-bit float"),
    ] {
        let (at, why) = refused(schema);
        assert!(
            at == field && why.contains(said) && why.starts_with(if at == "schema" { "" } else { &at }),
            "{schema}: {at}: {why}"
        );
    }
}

#[test]
fn a_schema_has_bounds() {
    let nested = |levels: usize| (0..levels).fold(json!({}), |inner, _| json!({"items": inner}));
    compiled(&nested(MAX_DEPTH - 1));
    assert!(refused(&nested(MAX_DEPTH).to_string()).1.contains("nested too deep"));

    let chain = |length: usize| {
        let link = |n: usize| (format!("d{n}"), json!({"$ref": format!("#/$defs/d{}", n + 1)}));
        let mut all: Map<String, Value> = (0..length).map(link).collect();
        all.insert(format!("d{length}"), json!({}));
        json!({"$defs": all, "$ref": "#/$defs/d0"})
    };
    compiled(&chain(MAX_DEPTH - 2));
    assert!(refused(&chain(1_250).to_string()).1.contains("nested too deep"));

    let double = |times: usize| {
        let both = |n: usize| {
            let below = json!({"$ref": format!("#/$defs/d{n}")});
            (format!("d{}", n + 1), json!({"allOf": [below, below]}))
        };
        let mut all: Map<String, Value> = (0..times).map(both).collect();
        all.insert("d0".to_owned(), json!({}));
        json!({"$defs": all, "items": {"$ref": format!("#/$defs/d{times}")}})
    };
    compiled(&double(5));
    assert!(refused(&double(12).to_string()).1.contains("counted as often as it is referred to"));

    let patterns =
        |n: usize| json!({"allOf": (0..n).map(|n| json!({"pattern": format!("^{n}$")})).collect::<Vec<_>>()});
    compiled(&patterns(MAX_PATTERNS));
    assert!(refused(&patterns(MAX_PATTERNS + 1).to_string()).1.contains("one pattern too many"));

    let of_size = |bytes: usize| format!(r#"{{"title":"{}"}}"#, "t".repeat(bytes - r#"{"title":""}"#.len()));
    assert!(Schema::compile(&of_size(MAX_SCHEMA)).is_ok());
    let too_large = Schema::compile(&of_size(MAX_SCHEMA + 1)).err().map(|error| error.code);
    assert_eq!(too_large, Some(Code::TooLarge));
}

#[test]
fn data_that_would_take_too_long_is_refused_before_it_is_checked() {
    let ones = |n: usize| raw(&format!("[{}1]", "1,".repeat(n - 1)));
    let width = |n: usize| compiled(&json!({"items": {"allOf": vec![json!({"type": "integer"}); n]}}));
    let steps = |n: usize| width(n).steps.value;
    assert!(steps(100) >= 2 * 100 && steps(100) < 300, "two for each schema that a value is held to: {}", steps(100));
    let fit = (MAX_STEPS / steps(100)) as usize - 1;
    assert_eq!(width(100).check(&ones(fit)), Ok(()));
    let refused = width(100).check(&ones(fit + 1)).expect_err("too much");
    assert_eq!((refused.code, refused.field.as_deref()), (Code::TooLarge, Some("data")));
}

/// What a schema may be said to take, and at least how often one value is looked at.
#[test]
fn the_bound_counts_whatever_may_be_applied_to_one_value() {
    let steps = |schema: Value| compiled(&schema).steps;
    let (leaf, alone) = (json!({"minimum": 1, "maximum": 2}), steps(json!({"minimum": 1, "maximum": 2})).value);
    for (schema, times) in [
        (json!({"anyOf": [leaf, leaf, leaf]}), 3),
        (json!({"oneOf": [leaf, leaf], "not": leaf}), 3),
        (json!({"if": leaf, "then": leaf, "else": leaf}), 3),
        (json!({"dependentSchemas": {"a": leaf, "b": leaf}}), 2),
        (json!({"items": leaf, "contains": leaf}), 2),
        (json!({"allOf": [{"items": leaf}, {"items": leaf}, {"prefixItems": [leaf, leaf]}]}), 3),
        (json!({"properties": {"a": leaf, "b": leaf}, "patternProperties": {"a": leaf, "^": leaf}}), 3),
        (json!({"additionalProperties": {"additionalProperties": {"allOf": [leaf, leaf, leaf]}}}), 3),
        (json!({"$defs": {"d": {"allOf": [leaf, leaf]}}, "allOf": [{"$ref": "#/$defs/d"}, {"$ref": "#/$defs/d"}]}), 4),
    ] {
        assert!(steps(schema.clone()).value >= times * alone, "{schema}");
    }
    let one_or_the_other = steps(json!({"properties": {"a": leaf, "b": leaf, "c": leaf}})).value;
    assert!(one_or_the_other < 2 * alone, "a field has one name");
    let lists = json!({"uniqueItems": true, "items": {"uniqueItems": true, "items": {"uniqueItems": true}}});
    assert_eq!(steps(lists).hashed, 3, "what is in three lists is compared in each");
    assert_eq!(steps(json!({"enum": vec![json!([1, 2, 3]); 1]})).value, 1 + 1 + 5 / 2);
}

/// Schemas of every keyword, small enough that data fits now and then.
fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({})),
        Just(json!(true)),
        Just(json!(false)),
        Just(json!({"$ref": "#/$defs/d"})),
        prop_oneof![Just("string"), Just("number"), Just("integer"), Just("object"), Just("array"), Just("null")]
            .prop_map(|it| json!({"type": it})),
        (0..3).prop_map(|n| json!({"minimum": n, "multipleOf": 0.5})),
        (0..3).prop_map(|n| json!({"minItems": n, "maxProperties": n, "minLength": n})),
        values().prop_map(|it| json!({"const": it})),
        prop::collection::vec(values(), 1..4).prop_map(|it| json!({"enum": it})),
        Just(json!({"required": ["a"], "uniqueItems": true})),
        Just(json!({"pattern": "^a"})),
    ];
    leaf.prop_recursive(3, 24, 3, |inner| {
        let some = || prop::collection::vec(inner.clone(), 1..3);
        prop_oneof![
            some().prop_map(|it| json!({"anyOf": it})),
            some().prop_map(|it| json!({"oneOf": it})),
            (some(), some(), some()).prop_map(|(all, any, one)| json!({"allOf": all, "anyOf": any, "oneOf": one})),
            inner.clone().prop_map(|it| json!({"not": it})),
            inner.clone().prop_map(|it| json!({"items": it})),
            inner.clone().prop_map(|it| json!({"contains": it, "maxContains": 1})),
            inner.clone().prop_map(|it| json!({"additionalProperties": it})),
            inner.clone().prop_map(|it| json!({"properties": {"a": it, "anyOf": {"type": "string"}}})),
            inner.clone().prop_map(|it| json!({"patternProperties": {"^a": it}})),
            inner.clone().prop_map(|it| json!({"dependentSchemas": {"a": it}})),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| json!({"if": a, "then": b, "else": c})),
        ]
    })
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1..3).prop_map(Value::from),
        Just(json!(0.5)),
        prop_oneof![Just(""), Just("a"), Just("ab"), Just("b")].prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map(prop_oneof![Just("a"), Just("b"), Just("anyOf")], inner, 0..3).prop_map(|it| {
                it.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
            }),
        ]
    })
}

proptest! {
    /// What is done to a schema to keep a refusal cheap changes no verdict.
    #[test]
    fn data_fits_a_schema_here_if_it_fits_it_as_it_was_set(schema in schemas(), data in values()) {
        let mut schema = if schema.is_object() { schema } else { json!({"allOf": [schema]}) };
        schema["$defs"] = json!({"d": {"anyOf": [{"type": "string"}, {"oneOf": [{"minimum": 1}, {"maximum": 1}]}]}});
        let as_it_is = jsonschema::draft202012::new(&schema).expect("it is one");
        let here = compiled(&schema);
        prop_assert_eq!(here.check(&raw(&data.to_string())).is_ok(), as_it_is.is_valid(&data));
    }
}
