//! Schemas as the components of an OpenAPI or AsyncAPI document: each once, under its name, with references to the others.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::schemas;

const HERE: &str = "#/components/schemas/";

/// The schemas that a document needs.
pub struct Components {
    known: BTreeMap<&'static str, Value>,
    schemas: Map<String, Value>,
}

impl Default for Components {
    fn default() -> Components {
        let known = schemas::all().into_iter().map(|(name, schema)| (name, schema.to_value())).collect();
        Components { known, schemas: Map::new() }
    }
}

impl Components {
    /// A reference to the schema of this name, which is a component from now on. A test finds a schema for each that is asked
    /// for.
    pub fn of(&mut self, name: &str) -> Value {
        if !self.schemas.contains_key(name)
            && let Some(schema) = self.known.get(name).cloned()
        {
            self.add(name, schema);
        }
        json!({"$ref": format!("{HERE}{name}")})
    }

    /// A schema of its own: its definitions are components as well.
    pub fn add(&mut self, name: &str, mut schema: Value) -> Value {
        let fields = schema.as_object_mut().map(|fields| (fields.remove("$schema"), fields.remove("$defs")));
        let defs = fields.and_then(|(_, defs)| defs);
        let defs = defs.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();

        // A name that is taken by something else is this schema's own.
        let taken = |def: &String, value: &Value| {
            let mut plain = value.clone();
            rename(&mut plain, &BTreeMap::new());
            self.schemas.get(def).is_some_and(|there| *there != plain)
        };
        let renamed: BTreeMap<String, String> = defs
            .iter()
            .filter(|(def, value)| taken(def, value))
            .map(|(def, _)| (def.clone(), format!("{name}.{def}")))
            .collect();
        for (def, mut value) in defs {
            rename(&mut value, &renamed);
            self.schemas.insert(renamed.get(&def).cloned().unwrap_or(def), value);
        }
        rename(&mut schema, &renamed);
        self.schemas.insert(name.to_owned(), schema);
        json!({"$ref": format!("{HERE}{name}")})
    }

    pub fn into_schemas(self) -> Map<String, Value> {
        self.schemas
    }
}

/// Has all references to definitions point to components.
fn rename(schema: &mut Value, renamed: &BTreeMap<String, String>) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get_mut("$ref")
                && let Some(def) = reference.strip_prefix("#/$defs/")
            {
                *reference = format!("{HERE}{}", renamed.get(def).map_or(def, String::as_str));
            }
            fields.values_mut().for_each(|inner| rename(inner, renamed));
        }
        Value::Array(all) => all.iter_mut().for_each(|inner| rename(inner, renamed)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_become_components_and_two_of_one_name_stay_apart() {
        let mut all = Components::default();
        let schema = |kind: &str| json!({"$defs": {"A": {"type": kind}}, "anyOf": [{"$ref": "#/$defs/A"}]});
        for (name, kind) in [("one", "string"), ("same", "string"), ("other", "number")] {
            assert_eq!(all.add(name, schema(kind)), json!({"$ref": format!("{HERE}{name}")}));
        }
        let schemas = all.into_schemas();
        assert_eq!(schemas["A"], json!({"type": "string"}));
        assert_eq!(schemas["other.A"], json!({"type": "number"}));
        assert_eq!(schemas["same"], json!({"anyOf": [{"$ref": "#/components/schemas/A"}]}));
        assert_eq!(schemas["other"], json!({"anyOf": [{"$ref": "#/components/schemas/other.A"}]}));
    }

    #[test]
    fn whatever_is_referred_to_is_there() {
        let mut all = Components::default();
        for (name, _) in schemas::all() {
            all.of(name);
        }
        let schemas = Value::Object(all.into_schemas());
        let text = schemas.to_string();
        assert!(!text.contains("#/$defs/"));
        for (at, _) in text.match_indices(HERE) {
            let name = text[at + HERE.len()..].split('"').next().unwrap_or_default();
            assert!(schemas.get(name).is_some(), "{name}");
        }
    }
}
