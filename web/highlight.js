// Code -> pieces with a class each: "comment", "string", "number", "keyword", "name" or "". One lexer for all languages: what
// starts a comment and which words are keywords is all that differs.

const WORDS = {
  c: "auto bool break case catch char class const constexpr continue default delete do double else enum extern false final float for friend goto if inline int long namespace new nullptr operator override private protected public return short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void volatile while",
  rust: "as async await bool box break char const continue crate dyn else enum extern f32 f64 false fn for i8 i16 i32 i64 i128 if impl in isize let loop match mod move mut pub ref return self Self static str struct super trait true type u8 u16 u32 u64 u128 union unsafe use usize where while",
  js: "abstract any as async await boolean break case catch class const continue debugger default delete do else enum export extends false finally for from function get if implements import in instanceof interface let new null number of package private protected public readonly return set static string super switch this throw true try type typeof undefined var void while with yield",
  python: "and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield",
  go: "break case chan const continue default defer else fallthrough false for func go goto if import interface iota map nil package range return select struct switch true type var",
  java: "abstract assert boolean break byte case catch char class const continue data default do double else enum extends false final finally float for fun if implements import in instanceof int interface is long native new null object open override package private protected public record return sealed short static super switch synchronized this throw throws transient true try val var void volatile when while",
  shell: "case do done echo elif else esac exit export fi for function if in local read return set shift source then until unset while",
  sql: "add all alter and as asc begin between by case check column commit constraint create cross default delete desc distinct drop else end exists foreign from full group having in index inner insert into is join key left like limit not null offset on or order outer primary references right rollback select set table then union unique update values view when where with",
  ruby: "alias and begin break case class def do else elsif end ensure false for if in module next nil not or redo rescue retry return self super then true undef unless until when while yield",
  data: "true false null yes no",
};
const FAMILIES = {
  c: "c", h: "c", cpp: "c", "c++": "c", cc: "c", cuda: "c", csharp: "java", cs: "java", java: "java", kotlin: "java", kt: "java", swift: "java",
  scala: "java", dart: "java", php: "js", rust: "rust", rs: "rust", js: "js", javascript: "js", jsx: "js", ts: "js", typescript: "js", tsx: "js",
  python: "python", py: "python", go: "go", golang: "go", sh: "shell", bash: "shell", shell: "shell", zsh: "shell", console: "shell", sql: "sql",
  ruby: "ruby", rb: "ruby", json: "data", yaml: "data", yml: "data", toml: "data", ini: "data", dockerfile: "shell", make: "shell", makefile: "shell",
  css: "c", html: "html", xml: "html", svg: "html",
};
const HASH_COMMENTS = new Set(["python", "shell", "ruby", "data"]);

/// [[class, text]], whose texts together are the code.
export function highlight(code, language) {
  const family = FAMILIES[language.toLowerCase()];
  if (!family) return [["", code]];
  if (family === "html") return pieces(code, /(<!--[^]*?(?:-->|$))|("[^"\n]*"|'[^'\n]*')|(<\/?[\w:-]+|\/?>)/g, ["comment", "string", "keyword"]);
  const comment = HASH_COMMENTS.has(family)
    ? "#[^\\n]*"
    : family === "sql" ? "--[^\\n]*|/\\*[^]*?(?:\\*/|$)" : "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
  const triple = family === "python" ? "\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|" : "";
  // A quote in Rust may be a lifetime.
  const single = family === "rust" ? "'(?:\\\\[^\\n]{1,9}|[^'\\\\\\n])'" : "'(?:\\\\[^]|[^'\\\\\\n])*'?";
  const back = family === "js" ? "|`(?:\\\\[^]|[^`\\\\])*`?" : "";
  const pattern = `(${comment})|(${triple}"(?:\\\\[^]|[^"\\\\\\n])*"?|${single}${back})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)(?=(\\s*\\()?)`;
  const words = new Set(WORDS[family].split(" "));
  const known = (word) => words.has(family === "sql" ? word.toLowerCase() : word);
  return pieces(code, new RegExp(pattern, "g"), ["comment", "string", "number", (word, call) => (known(word) ? "keyword" : call ? "name" : "")]);
}

function pieces(code, pattern, classes) {
  const out = [];
  let at = 0;
  for (const match of code.matchAll(pattern)) {
    if (!match[0]) continue;
    const group = classes.findIndex((_, index) => match[index + 1] !== undefined);
    const kind = typeof classes[group] === "function" ? classes[group](match[0], match[group + 2]) : classes[group];
    if (match.index > at) out.push(["", code.slice(at, match.index)]);
    out.push([kind ?? "", match[0]]);
    at = match.index + match[0].length;
  }
  if (at < code.length) out.push(["", code.slice(at)]);
  return out;
}
