//! A small JSON reader: enough for fio's report, QEMU's monitor and hawser's API.
//!
//! Owns: text → [`Json`]. Must not know: who wrote the text.
//! Not a validator: it accepts a little more than the grammar does, and numbers are `f64`.

#![forbid(unsafe_code)]

use crate::Result;

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true`, `false`.
    Bool(bool),
    /// Any number.
    Number(f64),
    /// A string.
    Text(String),
    /// An array.
    Array(Vec<Json>),
    /// An object, in the order of the text.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Parses one value; what stands before the first brace and after the last is ignored (fio prints notes there).
    pub fn parse(text: &str) -> Result<Json> {
        let from = text
            .find(['{', '['])
            .ok_or_else(|| format!("no JSON in {:?}", text.chars().take(80).collect::<String>()))?;
        let mut reader = Reader { bytes: text.as_bytes(), at: from, depth: 0 };
        reader.value()
    }

    /// Follows a dotted path of object keys and array indices: `jobs.0.read.iops`.
    pub fn get(&self, path: &str) -> Option<&Json> {
        path.split('.').try_fold(self, |value, key| match value {
            Json::Object(fields) => fields.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            Json::Array(items) => items.get(key.parse::<usize>().ok()?),
            _ => None,
        })
    }

    /// The number at `path`, or an error that names the path.
    pub fn number(&self, path: &str) -> Result<f64> {
        match self.get(path) {
            Some(Json::Number(number)) => Ok(*number),
            other => Err(format!("JSON {path}: a number was expected, found {other:?}")),
        }
    }

    /// The string at `path`, or an error that names the path.
    pub fn text(&self, path: &str) -> Result<&str> {
        match self.get(path) {
            Some(Json::Text(text)) => Ok(text),
            other => Err(format!("JSON {path}: a string was expected, found {other:?}")),
        }
    }

    /// The array at `path`, or an error that names the path.
    pub fn array(&self, path: &str) -> Result<&[Json]> {
        match self.get(path) {
            Some(Json::Array(items)) => Ok(items),
            other => Err(format!("JSON {path}: an array was expected, found {other:?}")),
        }
    }
}

/// Deeper nesting than this is not ours.
const DEPTH_MAX: u32 = 64;

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

impl Reader<'_> {
    fn peek(&mut self) -> Result<u8> {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.bytes.get(self.at).copied().ok_or_else(|| "JSON ends early".to_owned())
    }

    fn expect(&mut self, wanted: u8) -> Result<()> {
        let found = self.peek()?;
        if found != wanted {
            return Err(format!(
                "JSON at byte {}: {:?} where {:?} was expected",
                self.at, found as char, wanted as char
            ));
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self) -> Result<Json> {
        match self.peek()? {
            b'{' => self.nested(|reader| {
                let mut fields = Vec::new();
                reader.list(b'}', |reader| {
                    let key = reader.string()?;
                    reader.expect(b':')?;
                    fields.push((key, reader.value()?));
                    Ok(())
                })?;
                Ok(Json::Object(fields))
            }),
            b'[' => self.nested(|reader| {
                let mut items = Vec::new();
                reader.list(b']', |reader| {
                    items.push(reader.value()?);
                    Ok(())
                })?;
                Ok(Json::Array(items))
            }),
            b'"' => Ok(Json::Text(self.string()?)),
            _ => self.word(),
        }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Result<Json>) -> Result<Json> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("JSON is nested too deeply".into());
        }
        self.at += 1;
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn list(&mut self, end: u8, mut item: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.peek()? == end {
            self.at += 1;
            return Ok(());
        }
        loop {
            item(self)?;
            if self.peek()? == end {
                self.at += 1;
                return Ok(());
            }
            self.expect(b',')?;
        }
    }

    fn string(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let mut text = Vec::new();
        loop {
            let byte = *self.bytes.get(self.at).ok_or("JSON ends inside a string")?;
            self.at += 1;
            match byte {
                b'"' => return Ok(String::from_utf8_lossy(&text).into_owned()),
                b'\\' => {
                    let escape = *self.bytes.get(self.at).ok_or("JSON ends inside a string")?;
                    self.at += 1;
                    match escape {
                        b'n' => text.push(b'\n'),
                        b't' => text.push(b'\t'),
                        b'r' => text.push(b'\r'),
                        b'u' => {
                            let digits =
                                self.bytes.get(self.at..self.at + 4).ok_or("JSON ends inside an escape")?;
                            self.at += 4;
                            let code = std::str::from_utf8(digits)
                                .ok()
                                .and_then(|d| u32::from_str_radix(d, 16).ok());
                            let letter = code.and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER);
                            text.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
                        }
                        other => text.push(other),
                    }
                }
                other => text.push(other),
            }
        }
    }

    fn word(&mut self) -> Result<Json> {
        let from = self.at;
        while self.bytes.get(self.at).is_some_and(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)) {
            self.at += 1;
        }
        match std::str::from_utf8(&self.bytes[from..self.at]).unwrap_or_default() {
            "null" => Ok(Json::Null),
            "true" => Ok(Json::Bool(true)),
            "false" => Ok(Json::Bool(false)),
            word => word
                .parse()
                .map(Json::Number)
                .map_err(|_| format!("JSON at byte {from}: {word:?} is no value")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_like_report_is_read() {
        let json = Json::parse("fio: note\n{ \"jobs\" : [ { \"read\": {\"iops\": 1.5e3}, \"name\":\"a\\\"\\u0041\" }, null ] }\n").unwrap();
        assert_eq!(json.number("jobs.0.read.iops").unwrap(), 1500.0);
        assert_eq!(json.text("jobs.0.name").unwrap(), "a\"A");
        assert_eq!(json.get("jobs.1"), Some(&Json::Null));
        assert_eq!(json.array("jobs").unwrap().len(), 2);
        assert!(json.number("jobs.0.write.iops").unwrap_err().contains("jobs.0.write.iops"));
    }

    #[test]
    fn truncated_text_is_an_error() {
        for text in ["", "{", "[1,", "{\"a\"", "[\"\\u00", "[tru]", "[1 2]"] {
            assert!(Json::parse(text).is_err(), "{text}");
        }
        assert!(Json::parse(&"[".repeat(100_000)).is_err());
    }
}
