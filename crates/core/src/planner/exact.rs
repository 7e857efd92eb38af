//! The best ring of up to [`super::EXACT_NODES_MAX`] nodes, by dynamic programming over sets of nodes (Held and Karp's
//! method for the shortest tour, with layers to hand out on the way).
//!
//! For each set of nodes that were used, the last of them and the bound at which its stage begins, the least score of a way
//! there is kept. Where that stage ends is decided next: a stage of node `v` from bound `k` to `e` costs
//! `before[v][e] - before[v][k]`, and memory allows it if `k >= earliest[v][e]`. So the best end at `e` is the least
//! `begin[k] - before[v][k]` over a window of `k` that only moves forward, which a queue of candidates gives in constant
//! time; the window of the last stage is looked through. With `n` nodes and `b` bounds that is `n² 2ⁿ b / 4` additions: twenty million for 12 nodes and 128 layers.

use std::{collections::VecDeque, ops::Range};

use super::{
    cost::{NEVER, Ns},
    problem::{Problem, Route},
};

/// The route of the least score up to `problem.score_max`.
pub(super) fn solve(problem: &Problem) -> Option<Route> {
    let mut table = Table::new(problem);
    let mut best: Option<(Ns, usize, usize)> = None;
    for set in 1..1 << problem.rows.len() {
        for (last, row) in problem.rows.iter().enumerate() {
            let ends = table.end_stages(set, last);
            if ends.is_empty() {
                continue;
            }
            let score = table.ends[problem.last()] + row.leave;
            let complete = set as u64 & problem.must == problem.must && score <= problem.score_max;
            if complete && best.is_none_or(|(least, ..)| score < least) {
                best = Some((score, set, last));
            }
            for (next, hop) in row.hops.iter().enumerate() {
                if set & 1 << next == 0 && *hop < NEVER {
                    table.begin_stages(set | 1 << next, next, ends.clone(), *hop);
                }
            }
        }
    }
    let (score, set, last) = best?;
    Some(Route { score, stages: table.walk_back(set, last) })
}

/// The least score before a stage, for each bound at which it may begin; [`NEVER`] outside of `within`.
#[derive(Clone)]
struct Begins {
    scores: Box<[Ns]>,
    within: Range<usize>,
}

struct Table<'a> {
    problem: &'a Problem,
    /// For a set and its last node, at `set * nodes + last`, where that node's stage may begin. `None`: no way leads there.
    begins: Vec<Option<Begins>>,
    /// What [`Table::end_stages`] found: the least score for each bound at which the stage may end.
    ends: Vec<Ns>,
    /// Bounds at which the stage may begin, the best first; each has its score less the layers before it.
    queue: VecDeque<(usize, Ns)>,
}

impl<'a> Table<'a> {
    fn new(problem: &'a Problem) -> Table<'a> {
        let (nodes, bounds) = (problem.rows.len(), problem.last() + 1);
        let mut table =
            Table { problem, begins: vec![None; nodes << nodes], ends: vec![NEVER; bounds], queue: VecDeque::new() };
        table.ends[problem.from] = 0;
        for (i, row) in problem.rows.iter().enumerate().filter(|(_, row)| row.enter < NEVER) {
            table.begin_stages(1 << i, i, problem.from..problem.from + 1, row.enter);
        }
        table
    }

    /// Fills `ends` for the stage of `last`, after the others of `set`. Returns the bounds at which it may end.
    fn end_stages(&mut self, set: usize, last: usize) -> Range<usize> {
        let Table { problem, begins, ends: least, queue } = self;
        let Problem { rows, rest, due, score_max, .. } = problem;
        let Some(Begins { scores, within }) = &begins[set * rows.len() + last] else { return 0..0 };
        let (row, whole) = (&rows[last], problem.last());
        least.fill(NEVER);
        queue.clear();
        let mut ends = least.len()..0;
        let mut end_at = |end: usize, score: Ns| {
            let score = score + row.before[end] + row.fixed;
            let allowed = set as u64 & due[end] == due[end] && row.ends.contains(&end);
            if allowed && score + rest[last][end] <= *score_max {
                least[end] = score;
                ends = ends.start.min(end)..end + 1;
            }
        };
        let begun = |begin: usize| {
            let is_begin = scores[begin] < NEVER && row.begins.contains(&begin);
            is_begin.then(|| scores[begin] - row.before[begin])
        };
        for end in within.start + 1..whole {
            let begin = end - 1;
            if let Some(score) = begun(begin) {
                while queue.back().is_some_and(|(_, worse)| *worse >= score) {
                    queue.pop_back();
                }
                queue.push_back((begin, score));
            }
            while queue.front().is_some_and(|(begin, _)| *begin < row.earliest[end]) {
                queue.pop_front();
            }
            match queue.front() {
                Some((_, score)) => end_at(end, *score),
                None if end >= within.end => break,
                None => {}
            }
        }
        // The last stage takes less memory than one that goes on, and may begin before the window of that.
        let window = within.start.max(row.earliest[whole])..whole.min(within.end);
        if let Some(score) = window.filter_map(begun).min() {
            end_at(whole, score);
        }
        ends
    }

    /// Goes on from `ends` to a stage of `next`, with which the set becomes `set`.
    fn begin_stages(&mut self, set: usize, next: usize, ends: Range<usize>, hop: Ns) {
        let slot = &mut self.begins[set * self.problem.rows.len() + next];
        let none = || Begins { scores: vec![NEVER; self.ends.len()].into(), within: ends.clone() };
        let begins = slot.get_or_insert_with(none);
        begins.within = begins.within.start.min(ends.start)..begins.within.end.max(ends.end);
        for (begin, end) in begins.scores[ends.clone()].iter_mut().zip(&self.ends[ends]) {
            *begin = (*begin).min(end + hop);
        }
    }

    /// The stages of the best way to the end of the model with `set`, of which `last` is the last.
    fn walk_back(&mut self, mut set: usize, mut last: usize) -> Vec<(usize, usize, usize)> {
        let rows = &self.problem.rows;
        let mut stages = Vec::new();
        let mut end = self.problem.last();
        while let Some(begins) = self.begins[set * rows.len() + last].clone() {
            self.end_stages(set, last);
            let (row, score) = (&rows[last], self.ends[end]);
            let costs = |begin: usize| begins.scores[begin] + row.before[end] - row.before[begin] + row.fixed;
            let began = |begin: &usize| row.begins.contains(begin) && costs(*begin) == score;
            let Some(begin) = (row.earliest[end]..end).find(began) else { break };
            stages.push((last, begin, end));
            set &= !(1 << last);
            let came_from = |previous: &usize| {
                self.end_stages(set, *previous).contains(&begin)
                    && self.ends[begin] + rows[*previous].hops[last] == begins.scores[begin]
            };
            let Some(previous) = (0..rows.len()).find(came_from) else { break };
            (last, end) = (previous, begin);
        }
        stages.reverse();
        stages
    }
}
