"""The report's page: its style and its words, with `$names` for what was measured."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Keeping the image in view: a keepsight demo</title>
<style>
:root { --paper: #fff; --ink: #1f2933; --soft: #5b6673; --line: #e2e6ea; --tint: #f4f7f9;
  --base: #6b7280; --pvm: #0e7490; --lora: #c2410c; --mlp: #7e22ce; --yes: #15803d; --no: #b91c1c; --mark: #fde68a; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191f; --ink: #e5e7eb; --soft: #a3adb8; --line: #2f353e;
--tint: #1e232b;
  --base: #9ca3af; --pvm: #38bdf8; --lora: #fb923c; --mlp: #c084fc; --yes: #4ade80; --no: #f87171; --mark: #7c5e10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, -apple-system, "Segoe UI",
sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 21px; margin: 52px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
p { margin: 0 0 14px; }
a { color: var(--pvm); }
.lead { color: var(--soft); font-size: 18px; }
.note { color: var(--soft); font-size: 15px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 22px 0 8px; }
.card { background: var(--tint); border-radius: 10px; padding: 14px 12px; border-top: 4px solid var(--base); }
.card b { display: block; font-size: 30px; line-height: 1.1; }
.card span { color: var(--soft); font-size: 14px; }
.card.pvm { border-color: var(--pvm); } .card.lora { border-color: var(--lora); } .card.mlp { border-color: var(--mlp);
}
.task { display: flex; gap: 24px; align-items: flex-start; flex-wrap: wrap; margin: 18px 0; }
.grid { width: 270px; flex: none; display: grid; grid-template: 22px 248px / 22px 248px; }
.grid img { width: 100%; display: block; border-radius: 4px; grid-area: 2 / 2; }
.grid i { font: 600 13px/1.2 system-ui, sans-serif; color: var(--soft); flex: 1; display: flex; align-items: center;
  justify-content: center; }
.columns { grid-area: 1 / 2; display: flex; } .rows { grid-area: 2 / 1; display: flex; flex-direction: column; }
.talk { flex: 1; min-width: 250px; }
.bubble { background: var(--tint); border-radius: 10px; padding: 12px 14px; margin-bottom: 10px; }
.bubble small { color: var(--soft); display: block; font-size: 13px; }
mark { padding: 0 3px; border-radius: 3px; color: inherit; }
mark.cell { background: var(--line); } mark.digit { background: var(--mark); font-weight: 700; }
.plot { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; display: block; margin: 16px 0; }
.scroll { overflow-x: auto; margin: 12px 0 16px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: 14px; }
th.n, td.n { text-align: right; padding-right: 0; padding-left: 12px; font-variant-numeric: tabular-nums; white-space:
nowrap; }
th .beyond { color: var(--ink); } th .beyond::after { content: "*"; }
b.pvm, b.pvm_plain { color: var(--pvm); } b.lora, b.lora_long { color: var(--lora); } b.mlp { color: var(--mlp); }
b.base { color: var(--base); }
dl { margin: 14px 0; } dt { border-top: 1px solid var(--line); padding-top: 8px; }
dt span { float: right; color: var(--soft); font-size: 15px; } dd { margin: 0 0 8px; font-size: 15px; clear: both; }
.verdict { list-style: none; padding: 0; margin: 14px 0; } .verdict li { margin-bottom: 10px; }
.yes, .no { font-size: 13px; font-weight: 700; padding: 1px 7px; border-radius: 9px; border: 1px solid currentColor;
margin-right: 4px;
  white-space: nowrap; }
.yes { color: var(--yes); } .no { color: var(--no); }
code { font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; }
code, pre { background: var(--tint); border-radius: 5px; } code { padding: 1px 4px; }
pre { padding: 12px 14px; overflow-x: auto; } pre code { padding: 0; }
footer { color: var(--soft); font-size: 14px; margin-top: 40px; border-top: 1px solid var(--line); padding-top: 16px; }
@media (max-width: 560px) { body { font-size: 16px; } main { padding: 24px 16px 60px; } h1 { font-size: 25px; }
  .cards { grid-template-columns: repeat(2, 1fr); } table { font-size: 14px; } th.n, td.n { padding-left: 7px; }
  dt span { float: none; display: block; } }
</style>
</head>
<body><main>

<h1>$headline</h1>
<p class="lead">Digits read correctly after $far words of output, which is $times times as long as anything the three
trained methods practised on. All three have the same number of parameters and saw the same data.</p>
<div class="cards">$cards</div>
<p class="note">Every number on this page was measured in the run that wrote it. The model is tiny (0.6 million
parameters) and trained from nothing on handwritten digits; what that can and cannot show stands <a href="#limits">at
the end</a>.</p>
$quick

<h2>The image and the question</h2>
<div class="task">
$image
<div class="talk">
<div class="bubble"><small>The model is shown the image and asked</small>describe</div>
<div class="bubble"><small>It answers in facts, wrapped in filler</small>$narration</div>
</div>
</div>
<p>$first_fact No cell is named twice, so a digit can never be copied from earlier words: <b>each one needs a look at
the image.</b> The filler says nothing about the image. It is there to make the answer long.</p>
<p>We write the answer for the model and ask at each of the last six facts which digit it would say. One word is one
token. The handwriting is real (1,797 digits that ship with scikit-learn), and the digits asked about here were in no
training image. The picture is enlarged and has lines between its cells; the model sees 32 x 32 pixels without
any.</p>

<h2>What gets lost: dilution</h2>
<p>A language model reads an image once, as a handful of tokens at the front (16 here). From then on each new word
shares out its attention, one whole, between those and all words so far. The image's tokens stay 16; the words become
thousands. The image's share is <em>diluted</em>.</p>
<p>The base model reads $base_short of the digits after $short words and <b>$base_far after $far</b>. $regime_note</p>
$controls_table
<p class="note">Two controls tell what the loss is made of. <b>Filler hidden</b>: the filler stays in place but may
not be attended to, so there are few competitors at the same distances; the base then reads $masked_far after $far
words. <b>Distances squeezed</b>: all competitors stay but are moved as near as in pretraining; it then reads
$squeezed_far. Where the first control dips, distance itself plays a part. A star marks lengths beyond the training
length of the methods below.</p>
$mass
<p>$mass_words</p>

<h2>Who competes</h2>
<p>The base's own weights are frozen for everyone. All methods see the same images and outputs of at most
$train_length words, in the same order, for the same number of steps (LoRA at full length, where listed, sees longer
ones).</p>
$methods

<h2>The result</h2>
$accuracy
$accuracy_table
<p class="note">$se_note A star marks lengths beyond the training length.</p>
$verdict
<h3>Another seed, another number</h3>
<p>$seeds_words</p>
$seeds_table

<h2>Is the memory really used?</h2>
<p>A good score is not yet proof that the memory did it. So we tamper with it. The language model is always shown the
right image; only what the memory holds changes.</p>
$causal
<p>$causal_words</p>
$causal_table
<p class="note">In short outputs the model's own attention still sees the right image, so the two can disagree there;
far out only the memory is left.</p>

<h2 id="limits">What this does not show</h2>
<ul>
<li><b>Other models.</b> This is a 0.6-million-parameter model in a laboratory task made for the purpose. The adapters
have $share of the size of its language model's layers; in the PVM paper (arXiv 2605.00814) it is 0.3&nbsp;% of an
8-billion model. Nothing here is a result on real models or benchmarks.</li>
<li><b>That falling attention is harm.</b> Attention on the image falls in any model, trained or not, as text grows
(see the plot above).</li>
<li><b>Dilution in general.</b> Many models fail in long outputs because they never saw such distances. This base was
pretrained with randomised positions to take that reason away, and the filler-hidden row is there to check it.</li>
<li><b>That the paper's recipe is reliable.</b> $warmup_words</li>
<li><b>That LoRA cannot do this.</b> $long_words</li>
<li><b>That a memory is immune.</b> Its question to the image comes from the same stream of thought that drifts in
long outputs. With some bases it falls too, though later.</li>
<li><b>Free speech.</b> The answers are scored within a given text. How well the model writes on its own is another
question.</li>
<li><b>Chance.</b> This is one seed ($seed); the table of seeds above shows how far others lie apart.</li>
</ul>

<h2>Try it</h2>
<p>The memory trained in this run is the folder <code>adapter</code> beside this page. Ask it about an image:</p>
<pre><code>keepsight generate adapter --image example-1.png --prompt read</code></pre> <p>and put one on a model of
your own:</p>
<pre><code>keepsight train pvm --help</code></pre>

<footer>$conditions Raw numbers: <code>results.json</code>.</footer>
</main></body>
</html>
"""
