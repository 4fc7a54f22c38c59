//! JSON values that every reader reads alike: of two fields of one name in an object one reader takes the first, another the last.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserializer, de};
use serde_json::{Map, Value};

/// A value, and how much there is of it.
#[derive(Debug, PartialEq)]
pub struct Counted {
    pub value: Value,
    /// All values in it, it included.
    pub values: u64,
    /// Those of them that are objects.
    pub objects: u64,
    /// Those of them that are numbers.
    pub numbers: u64,
}

/// Reads JSON that is valid and has been checked ([`super::json::check_contents`]). Refuses a field that stands twice, by its
/// JSON Pointer.
pub fn read(text: &str) -> Result<Counted, String> {
    let reading = Reading::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    match Seed(&reading).deserialize(&mut deserializer) {
        Ok(value) => {
            let Reading { values, objects, numbers, .. } = reading;
            Ok(Counted { value, values: values.get(), objects: objects.get(), numbers: numbers.get() })
        }
        Err(_) => Err(reading.twice.into_inner()),
    }
}

/// A name as a part of a JSON Pointer.
pub fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[derive(Default)]
struct Reading {
    values: Cell<u64>,
    objects: Cell<u64>,
    numbers: Cell<u64>,
    /// Where the field is that stands twice.
    twice: RefCell<String>,
}

impl Reading {
    fn number(&self, it: impl Into<Value>) -> Value {
        self.numbers.set(self.numbers.get() + 1);
        it.into()
    }

    /// What went wrong did so in this part.
    fn inside(&self, part: &str) {
        self.twice.borrow_mut().insert_str(0, &format!("/{}", escaped(part)));
    }
}

#[derive(Clone, Copy)]
struct Seed<'r>(&'r Reading);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.values.set(self.0.values.get() + 1);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, it: bool) -> Result<Value, E> {
        Ok(it.into())
    }

    fn visit_u64<E: de::Error>(self, it: u64) -> Result<Value, E> {
        Ok(self.0.number(it))
    }

    fn visit_i64<E: de::Error>(self, it: i64) -> Result<Value, E> {
        Ok(self.0.number(it))
    }

    fn visit_f64<E: de::Error>(self, it: f64) -> Result<Value, E> {
        Ok(self.0.number(it))
    }

    fn visit_str<E: de::Error>(self, it: &str) -> Result<Value, E> {
        Ok(it.into())
    }

    fn visit_string<E: de::Error>(self, it: String) -> Result<Value, E> {
        Ok(it.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        loop {
            let next = items.next_element_seed(self);
            match next.inspect_err(|_| self.0.inside(&all.len().to_string()))? {
                Some(item) => all.push(item),
                None => return Ok(all.into()),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        self.0.objects.set(self.0.objects.get() + 1);
        let mut all = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if all.contains_key(&name) {
                self.0.inside(&name);
                return Err(A::Error::custom("it stands twice"));
            }
            let value = fields.next_value_seed(self).inspect_err(|_| self.0.inside(&name))?;
            all.insert(name, value);
        }
        Ok(all.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_is_read_as_it_is_and_counted() {
        let text = r#"{"a":[1,-2,1.5,null,true,"b\n",{}],"a/b":{"~":[]}}"#;
        let read = read(text).expect("nothing stands twice");
        assert_eq!(read.value, json!({"a": [1, -2, 1.5, null, true, "b\n", {}], "a/b": {"~": []}}));
        assert_eq!((read.values, read.objects, read.numbers), (11, 3, 3));
    }

    #[test]
    fn a_field_that_stands_twice_is_found_wherever_it_is() {
        for (text, at) in [
            (r#"{"a":1,"a":1}"#, "/a"),
            (r#"[0,{"b":[{"a/b":1,"\u0061/b":2}]}]"#, "/1/b/0/a~1b"),
            (r#"{"":{"~":{},"~":{}}}"#, "//~0"),
        ] {
            assert_eq!(read(text), Err(at.to_owned()), "{text}");
        }
        assert!(read(r#"{"a":{"b":1},"b":{"b":1}}"#).is_ok());
    }
}
