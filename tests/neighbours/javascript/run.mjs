// Run pipelines of transformers.js on local folders: a JSON object on stdin, the results of its jobs on stdout.
import { readFileSync } from "node:fs";
import { AutoConfig, env, pipeline } from "@huggingface/transformers";

const { root, jobs } = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = root;

const results = [];
for (const { task, model, dtype, as_bert, inputs, options } of jobs) {
  try {
    let config = null;
    if (as_bert) {
      config = await AutoConfig.from_pretrained(model);
      config.model_type = "bert";
    }
    const run = await pipeline(task, model, { config, dtype });
    const output = await run(...inputs, options ?? {});
    results.push(output.tolist ? output.tolist() : output);
  } catch (error) {
    results.push(String(error));
  }
}
console.log(JSON.stringify(results));
